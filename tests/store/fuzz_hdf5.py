"""Damage HDF5 files of a store at random, forge the digests to fit, and read: run by test_hostile.

    python -m tests.store.fuzz_hdf5 SEED ROUNDS

A process of its own, because HDF5 itself could crash or loop for ever.
"""

import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from pipeline.errors import StoreError
from pipeline.store import open_store
from pipeline.store.manifest import _checksum

GOLDEN = Path(__file__).parents[1] / "data" / "stores"


def damage(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, more often near the start, where HDF5 keeps its structure."""
    damaged = bytearray(data)
    end = rng.choice([len(data), min(len(data), 4000), 700])
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        i = rng.randrange(end)
        bit = damaged[i] ^ (1 << rng.randrange(8))
        damaged[i] = rng.choice([0, 255, bit, rng.randrange(256)])
    return bytes(damaged)


def main(seed: int, rounds: int) -> None:
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        for version in sorted(GOLDEN.iterdir()):
            folder = shutil.copytree(version, Path(scratch) / version.name)
            manifest = (folder / "store.json").read_bytes()
            files = [*folder.glob("samples-*.h5"), *(folder / "shards").iterdir()]
            intact = {path: path.read_bytes() for path in files}
            for _ in range(rounds):
                path = rng.choice(files)
                data = damage(intact[path], rng)
                path.write_bytes(data)
                document = json.loads(manifest)
                for info in [document["samples"], *document["shards"]]:
                    if info["file"] == path.name:
                        info.update(sha256=hashlib.sha256(data).hexdigest())
                document["checksum"] = _checksum(document)
                (folder / "store.json").write_text(json.dumps(document))
                try:
                    store = open_store(folder)
                    store.ids(), store.labels(), np.asarray(store.features())
                    outcomes["read"] += 1
                except StoreError:
                    outcomes["refused"] += 1
                path.write_bytes(intact[path])
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
