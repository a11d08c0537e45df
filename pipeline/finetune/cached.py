"""Activations at the split point of a network: embedded once into a store, and trained on from it.

With ``last:N`` everything below the last N blocks gives the same in every epoch, so it is computed
once, by an ordinary extraction of an unpooled layer. Training then reads the store and no image.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.backbones.backbone import Backbone
from pipeline.backbones.preprocess import Preprocess
from pipeline.data import DataSource
from pipeline.errors import MismatchError, ResourceError
from pipeline.extract.extractor import Settings as ExtractSettings
from pipeline.extract.extractor import extract
from pipeline.finetune.checkpoint import StoppedError
from pipeline.finetune.data import (
    TrainingData,
    choose_columns,
    group_names,
    is_labelled,
    no_labels,
    plan_training,
    source_notes,
)
from pipeline.finetune.images import (
    PLAIN_BATCH_SIZE,
    Batch,
    Images,
    Indices,
    epoch_order,
    make_batch,
    plain_order,
)
from pipeline.finetune.network import Classifier
from pipeline.finetune.parallel import ALONE, Team
from pipeline.finetune.settings import Settings
from pipeline.finetune.top import SplitPoint, TopClassifier, make_top
from pipeline.heads.features import HeadInputs, StoredFeatures
from pipeline.heads.tasks import strata
from pipeline.store import Store, open_store

# Rows that are read in one go where a store does not fit in memory.
_STRETCH_BYTES = 8_000_000
_N_COMPARED = 4
_PRECISIONS = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def embed_activations(
    source: DataSource,
    backbone: Backbone,
    split: SplitPoint,
    settings: Settings,
    dtype: torch.dtype | None = None,
    *,
    cache_dir: Path = Path("cache"),
    on_plan: Callable[[int, int], None] = lambda *_: None,
    on_progress: Callable[[int], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Store:
    """The store of a network's activations at a split point; what it lacks is embedded.

    Args:
        source: the images.
        backbone: with the weights that stay frozen.
        split: which activations.
        settings: views, device and threads.
        dtype: of mixed precision in training, which the bottom would run in, too.
        cache_dir: where stores are kept.
        on_plan: is told how many images there are, and how many of them to embed.
        on_progress: is told how many more are done.
        note: is told the size in bytes before anything is written, and what else is worth knowing.
        should_stop: whether the user asked to stop.

    Raises:
        ResourceError: the disk lacks room for it.
        StoppedError: the user asked to stop; what was embedded is kept.
        TlpipeError: see :func:`~pipeline.extract.extractor.extract`.
    """

    def plan(n_images: int, n_todo: int) -> None:
        if n_todo:
            note(_check_room(n_todo, settings.n_views, split, cache_dir))
        on_plan(n_images, n_todo)

    report = extract(
        source,
        backbone,
        ExtractSettings(
            layers=(split.layer,),
            pooling=split.pooling,
            precision=_PRECISIONS[dtype],
            n_views=settings.n_views,
            device=settings.device,
            n_threads=settings.n_threads,
        ),
        cache_dir=cache_dir,
        on_plan=plan,
        on_progress=on_progress,
        on_note=note,
        should_stop=should_stop,
    )
    if report.interrupted:
        raise StoppedError("Stopped while activations were embedded; those that were are kept.")
    return open_store(report.store)


def _check_room(n_todo: int, n_views: int, split: SplitPoint, cache_dir: Path) -> str:
    """How much will be written, in words.

    Raises:
        ResourceError: the disk lacks room for it.
    """
    n_bytes = n_todo * n_views * math.prod(split.shape) * np.dtype(np.float16).itemsize
    views = f" of {n_views} views each" if n_views > 1 else ""
    shape = "×".join(map(str, split.shape))
    what = (
        f"Activations of {split.layer} ({shape}, float16) for {n_todo:,} images{views} take "
        f"{n_bytes:,} bytes in {cache_dir}"
    )
    n_free = shutil.disk_usage(cache_dir).free
    if n_bytes > n_free:
        raise ResourceError(
            f"{what}, and the disk has {n_free:,} bytes free.\n"
            "  Make room, give another disk with --cache, train fewer blocks (the later the split "
            "point, the smaller), or leave --cached out."
        )
    return f"{what}."


def check_store(store: Store, backbone: Backbone, split: SplitPoint) -> None:
    """Refuse a store that holds other activations than those to go on from.

    Raises:
        MismatchError: its layer, pooling or weights are others.
    """
    again = (
        f"\n  Extract those:  tlpipe extract … --backbone {backbone.name} --layers {split.layer} "
        f"--pooling {split.pooling}"
    )
    if split.layer not in store.layers:
        raise MismatchError(
            f"{store.path} holds layer {', '.join(store.layers)}, but training goes on from "
            f"{split.layer}.{again}"
        )
    if store.layers[split.layer] != split.shape:
        found, wanted = ("×".join(map(str, s)) for s in (store.layers[split.layer], split.shape))
        raise MismatchError(
            f"{store.path} holds layer {split.layer} as {found}, but training needs it unpooled, "
            f"{wanted}.{again}"
        )
    if store.recipe["weights"] != backbone.weights_digest:
        raise MismatchError(
            f"{store.path} holds activations of {store.recipe['backbone']} with weights "
            f"{str(store.recipe['weights'])[:8]}…, but {backbone.name} with weights "
            f"{backbone.weights_digest[:8]}… is trained.{again}"
        )


class Activations:
    """One layer of a store with all its views: in memory where it fits, else read as needed.

    Args:
        store: feature store.
        layer: name of the layer.
        memory_bytes: how much of it may be in memory.
    """

    def __init__(self, store: Store, layer: str, memory_bytes: int) -> None:
        self.n_views = store.n_views
        self._views = [store.features(layers=[layer], view=view) for view in range(store.n_views)]
        self.row_bytes = math.prod(store.layers[layer]) * self._views[0].dtype.itemsize
        self.memory_bytes = memory_bytes

    @property
    def fits(self) -> bool:
        """Whether all of it is kept in memory."""
        return len(self._views[0]) * self.n_views * self.row_bytes <= self.memory_bytes

    @property
    def stretch(self) -> int:
        """Rows that are read in one go."""
        return max(1, _STRETCH_BYTES // (self.row_bytes * self.n_views))

    def read(self, rows: Indices, views: Indices) -> torch.Tensor:
        """(n, ...) of the store's dtype: each row in its view."""
        if self.fits:
            return torch.from_numpy(self._all[rows, views])
        out = np.empty((len(rows), *self._views[0].shape[1:]), self._views[0].dtype)
        # Rows of a stretch lie side by side in a shard; of a view, they are one read.
        groups = (rows // self.stretch) * self.n_views + views
        order = np.argsort(groups, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
            out[part] = self._views[views[part[0]]][rows[part]]
        return torch.from_numpy(out)

    @cached_property
    def _all(self) -> NDArray[np.floating]:
        """(n_samples, n_views, ...)."""
        n, *shape = self._views[0].shape
        kept = np.empty((n, self.n_views, *shape), self._views[0].dtype)
        for view, values in enumerate(self._views):
            for start in range(0, n, self.stretch):
                kept[start : start + self.stretch, view] = values[start : start + self.stretch]
        return kept


@dataclass(frozen=True)
class StoredBatches:
    """Some of a store's samples with what is to be learned of them; see `images.Batches`.

    In memory, the samples of each batch are those that images would have. Else batches are mixed
    from stretches of the file that are shuffled, as many at once as the memory holds.

    Attributes:
        activations: of all samples.
        rows: which of them, rising.
        targets: (n_rows,) int64.
        batch_size: samples a step, in all processes.
        seed: of the order, and of which view each epoch shows.
        channels_last: memory format of maps on the device.
        team: processes that share every batch.
    """

    activations: Activations
    rows: Indices
    targets: torch.Tensor
    batch_size: int
    seed: int
    channels_last: bool = True
    team: Team = ALONE

    @property
    def n_steps(self) -> int:
        """Batches in an epoch."""
        return max(1, -(-len(self.rows) // self.batch_size))

    def training(self, epoch: int, first_step: int = 0) -> Generator[Batch]:
        """The batches of an epoch from ``first_step`` on."""
        n, n_views = len(self.rows), self.activations.n_views
        views = np.random.default_rng([self.seed, epoch, 1]).integers(n_views, size=n)
        n_together = self._n_together(self.batch_size)
        if self.activations.fits:
            order = epoch_order(n, self.batch_size, self.seed, epoch)
        else:
            order = mixed_order(
                n, self.batch_size, self.activations.stretch, n_together, self.seed, epoch
            )
        return self._batches(order, views, n_together, first_step, self.team)

    def plain(self) -> Generator[Batch]:
        """All samples as they are, in order; of several processes, each has its part of them."""
        order = plain_order(len(self.rows), self.team)
        views = np.zeros(len(self.rows), np.intp)
        return self._batches(order, views, self._n_together(PLAIN_BATCH_SIZE), 0, ALONE)

    def to_device(self, inputs: torch.Tensor, device: torch.device) -> torch.Tensor:
        """(n, ...) float32."""
        is_map = inputs.ndim == 4 and self.channels_last
        return inputs.to(
            device=device,
            dtype=torch.float32,
            non_blocking=True,
            memory_format=torch.channels_last if is_map else torch.contiguous_format,
        )

    def take(self, n: int) -> StoredBatches:
        """At most ``n`` of its samples, spread over all of them."""
        if n >= len(self.rows):
            return self
        some = np.linspace(0, len(self.rows) - 1, n).astype(np.intp)
        return replace(self, rows=self.rows[some], targets=self.targets[some.tolist()])

    def _n_together(self, batch_size: int) -> int:
        """Batches that are read at once; as many more are held by the training."""
        n_bytes = batch_size * self.activations.row_bytes
        return max(1, self.activations.memory_bytes // 2 // n_bytes)

    def _batches(
        self, order: Sequence[Indices], views: Indices, n_together: int, first: int, team: Team
    ) -> Generator[Batch]:
        """Batch by batch; where the store is not in memory, read ahead in a thread."""
        parts = [team.part(whole) for whole in order]
        if self.activations.fits:
            for part, whole in zip(parts[first:], order[first:], strict=True):
                inputs = self.activations.read(self.rows[part], views[part])
                yield make_batch(inputs, self.targets, part, whole)
            return
        starts = range(first - first % n_together, len(order), n_together)
        groups = [range(max(first, i), min(i + n_together, len(order))) for i in starts]

        def read(group: range) -> torch.Tensor:
            every = np.concatenate([parts[i] for i in group])
            return self.activations.read(self.rows[every], views[every])

        with ThreadPoolExecutor(1, "read") as reader:
            waiting = [reader.submit(read, group) for group in groups[:1]]
            for place, group in enumerate(groups):
                values = waiting.pop().result()
                waiting += [reader.submit(read, ahead) for ahead in groups[place + 1 : place + 2]]
                sizes = [len(parts[i]) for i in group]
                for inputs, i in zip(torch.split(values, sizes), group, strict=True):
                    yield make_batch(inputs, self.targets, parts[i], order[i])


def mixed_order(
    n_samples: int, batch_size: int, stretch: int, n_together: int, seed: int, epoch: int
) -> list[Indices]:
    """Samples of each batch of an epoch, so that few stretches are open at a time.

    Stretches of neighbours are shuffled, and batches then shuffled together, some at a time.

    Args:
        n_samples: to shuffle.
        batch_size: at most.
        stretch: neighbours that stay together at first.
        n_together: batches that are shuffled together.
        seed: of the order.
        epoch: each has an order of its own.
    """
    random = np.random.default_rng([seed, epoch])
    stretches = np.array_split(np.arange(n_samples), max(1, -(-n_samples // stretch)))
    order = np.concatenate([stretches[i] for i in random.permutation(len(stretches))])
    batches = np.array_split(order, max(1, -(-n_samples // batch_size)))
    mixed: list[Indices] = []
    for start in range(0, len(batches), n_together):
        some = batches[start : start + n_together]
        mixed += np.array_split(random.permutation(np.concatenate(some)), len(some))
    return mixed


@dataclass(frozen=True)
class Cached:
    """What a training reads instead of images.

    Attributes:
        split: where the network is parted.
        activations: of the store.
        places: (n_samples,), row of each sample of the data among those of the store.
    """

    split: SplitPoint
    activations: Activations
    places: Indices

    def batches(self, data: TrainingData, rows: Indices, settings: Settings) -> StoredBatches:
        """Batches of some samples of the data."""
        return StoredBatches(
            self.activations, self.places[rows], torch.from_numpy(data.samples.codes[rows]),
            settings.batch_size, settings.seed, settings.channels_last,
        )  # fmt: skip

    def top(self, whole: Classifier, data: TrainingData, preprocess: Preprocess) -> TopClassifier:
        """The part of a network that is trained, compared with the whole on a few images.

        Raises:
            UsageError: it does not give what the whole network gives.
            DataError: one of these images cannot be read.
        """
        device = next(whole.head.parameters()).device
        n = len(self.places)
        some = np.linspace(0, n - 1, min(n, _N_COMPARED)).astype(np.intp)
        pixels = list(data.images.views(some.tolist(), lambda pixels, _: preprocess(pixels)))
        stored = self.activations.read(self.places[some], np.zeros(len(some), np.intp))
        return make_top(
            whole,
            self.split,
            preprocess.normalise(torch.stack(pixels).to(device)),
            stored.to(device).float(),
        )


def stored_data(
    store: Store,
    source: DataSource,
    split: SplitPoint,
    settings: Settings,
    label: str | Sequence[str] | None,
    groups: str | None = None,
) -> tuple[TrainingData, Cached]:
    """Who trains, who chooses and who scores, from a store's own table; no image is read.

    Args:
        store: of the data source.
        source: the images.
        split: which activations the store holds.
        settings: seed and memory.
        label: one label column or several; None for "label" or the only one.
        groups: column of samples that belong together and are never parted.

    Raises:
        UsageError: unknown column.
        DataError: no labels, no train split or too few classes.
    """
    columns = choose_columns(source, label)
    ids = np.array(store.ids(), dtype=object)
    labels = {column: store.labels(column) for column in columns}
    splits, table = store.splits(), store.table
    has_splits = bool(table.splits.any())
    usable = is_labelled(labels)
    places = np.flatnonzero(usable & (splits != "") if has_splits else usable)
    if not len(places):
        raise no_labels(source, columns)
    known = is_labelled({column: table.labels[column].decode() for column in columns})
    has_label = dict(zip(table.ids, known.tolist(), strict=True))
    has_split = dict(zip(table.ids, table.splits.tolist(), strict=True))
    failed = {
        name: why
        for name, why in store.failures.items()
        if has_label[name] and (has_split[name] or not has_splits)
    }
    taken = {column: values[places] for column, values in labels.items()}
    inputs = HeadInputs(
        features=StoredFeatures((store,), ((split.layer,),), (places,)),
        ids=ids[places],
        labels=strata(taken),
        splits=splits[places] if has_splits else np.full(len(places), "train"),
        digests=table.digests[table.ready][places],
        blocks=(),
        label_column=" + ".join(columns),
        groups=None if groups is None else group_names(ids, store.labels(groups))[places],
        notes=source_notes(
            source, columns, sum(has_label.values()), len(places) + len(failed), len(failed),
            has_splits,
        ),
        columns=taken if len(taken) > 1 else {},
    )  # fmt: skip
    files = {sample.id: sample.file for sample in source.samples}
    data = TrainingData(
        *plan_training(inputs, store.split_origin, settings, groups),
        Images([files[name] for name in inputs.ids], n_threads=1),
        {"name": source.name, "spec": source.spec, "layout": source.layout},
        failed,
    )
    activations = Activations(store, split.layer, settings.cache_bytes)
    return data, Cached(split, activations, places)
