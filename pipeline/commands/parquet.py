"""Features as a Parquet file. It needs pyarrow, which the store itself does without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import UsageError
from pipeline.store.pack import new_file

if TYPE_CHECKING:
    from pipeline.store.export import Selection


def export_parquet(selection: Selection, path: Path, about: dict[str, str]) -> None:
    """Write ids, splits and labels as text, and each layer as a list of float32 a row.

    Lists have one length, which Arrow knows; every reader of Parquet reads them. float16 is not
    used, as many readers do not know it.

    Args:
        selection: what to write, in row groups of a few MB.
        path: a new file.
        about: what is worth knowing, kept in the file's metadata.

    Raises:
        UsageError: pyarrow is not installed, or ``path`` exists.
        StoreError: the folder cannot be written to.
        ResourceError: the disk is full or fails.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(
            "Parquet files are written by pyarrow, which is not installed.\n"
            "  Install it:  pip install 'tlpipe[parquet]'"
        ) from error
    widths = {name: int(np.prod(layer.shape[1:])) for name, layer in selection.layers.items()}
    schema = pa.schema(
        [pa.field(name, pa.string()) for name in selection.columns]
        + [pa.field(name, pa.list_(pa.float32(), width)) for name, width in widths.items()],
        metadata=about,
    )
    with (
        new_file(path) as temporary,
        # Numbers hardly ever repeat: only texts gain by a dictionary.
        pq.ParquetWriter(temporary, schema, use_dictionary=list(selection.columns)) as writer,
    ):
        for here in selection.stretches():
            arrays = [pa.array(c[here], pa.string()) for c in selection.columns.values()]
            for name, width in widths.items():
                numbers = pa.array(selection.rows(name, here).ravel())
                arrays.append(pa.FixedSizeListArray.from_arrays(numbers, width))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
