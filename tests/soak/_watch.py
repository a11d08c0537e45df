"""What a reader saw, and that it is still there."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np

from pipeline.store import open_store
from pipeline.store.verify import verify_store
from tests.soak._photos import Reference
from tests.soak._runs import HANG_SECONDS, Ended, Run

LOOK_SECONDS = 0.01
"""Between two looks: the run that is looked at needs the processor, too."""


class Watcher:
    """A reader of a store that is being written, and its memory.

    Whatever it saw in the store was acknowledged. Each look checks that every row is the one that
    the sample's image gives, and that nothing has gone that was there before.

    Args:
        folder: the store, which need not be there yet.
        references: runs that know the features of every image that the data source ever had.

    Attributes:
        rows: digest by id of all samples that were seen with features of their present bytes.
        n_looks: how often there was a store to look at.
    """

    def __init__(self, folder: Path, *references: Reference) -> None:
        self.folder = folder
        self.rows: dict[str, str] = {}
        self.n_looks = 0
        self._features: dict[str, bytes] = {}
        self._digests: dict[str, set[str]] = {}
        self._current: dict[str, str] = {}
        for reference in references:
            self.learn(reference)

    def learn(self, reference: Reference) -> None:
        """The data source is now as this run found it: forget what was removed or changed.

        A store may show its old rows until the next run has looked at the files.
        """
        self._features |= reference.rows
        self._current = reference.digests
        current = self._current.items()
        self.rows = {i: digest for i, digest in self.rows.items() if (i, digest) in current}
        for sample_id, digest in reference.digests.items():
            self._digests.setdefault(sample_id, set()).add(digest)

    def look(self) -> int:
        """Read the whole store once.

        Returns:
            Of how many samples it has features of their present bytes; -1 without a store.
        """
        if not (self.folder / "store.json").exists():
            assert not self.rows, "the store has vanished"
            return -1
        store = open_store(self.folder)
        ids, digests, labels = store.ids(), store.digests().tolist(), store.labels().tolist()
        features = np.asarray(store.features())
        for sample_id, digest, label, row in zip(ids, digests, labels, features, strict=True):
            assert digest in self._digests[sample_id], f"{sample_id} never had such bytes"
            assert row.tobytes() == self._features[digest], f"{sample_id} has other features"
            assert label == sample_id.partition("/")[0]
        seen = dict(zip(ids, digests, strict=True))
        lost = [i for i, digest in self.rows.items() if seen.get(i) != digest]
        assert not lost, f"{len(lost)} acknowledged rows are lost: {lost[:5]}"
        for sample_id, digest in zip(ids, digests, strict=True):
            if self._current.get(sample_id) == digest:
                self.rows[sample_id] = digest
        self.n_looks += 1
        return len(self.rows)

    def watch(self, run: Run, *, until_rows: float = math.inf) -> Ended | None:
        """Look again and again until a run ends; one that does not is killed.

        Args:
            run: writes to the store.
            until_rows: stop looking, too, when so many rows are there; gives None then.
        """
        try:
            return self._watch(run, until_rows)
        except BaseException:
            run.kill()  # or it would go on, and write into what the next test expects to be its own
            raise

    def _watch(self, run: Run, until_rows: float) -> Ended | None:
        deadline = time.monotonic() + HANG_SECONDS
        while (ended := run.poll()) is None:
            if self.look() >= until_rows:
                return None
            time.sleep(LOOK_SECONDS)
            if time.monotonic() > deadline:
                return run.wait(0.0)
        return ended

    def watch_to_end(self, run: Run) -> Ended:
        """Look again and again until a run ends, and verify then what it left behind."""
        ended = self.watch(run)
        assert ended is not None
        self.check()
        return ended

    def check(self) -> None:
        """Look, and verify every byte."""
        self.look()
        if (self.folder / "store.json").exists():
            assert problems_of(self.folder) == []


def problems_of(folder: Path) -> list[str]:
    """What `tlpipe verify --content` would find in a store."""
    report = verify_store(folder, content=True)
    return [f"{p.where}: {p.what} {p.remedy}" for p in report.problems]
