"""``tlpipe verify`` as a user types it, and what ``extract`` makes of a repaired store."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.commands.verify import extract_command, weights_at_hand
from pipeline.store import open_store
from pipeline.store.manifest import BACKUP_FILE, MANIFEST_FILE, read_manifest
from pipeline.store.writer import StoreWriter

ROOT = Path(__file__).parents[2]
EXTRACT = ("extract", "photos", "--backbone", "pixels:4")


def write_photo(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def store(tmp_path, monkeypatch, tlpipe):
    """A store of 24 photographs in three shards, in the folder that is the place to be."""
    monkeypatch.chdir(tmp_path)
    for n in (10, 20, 24):  # each run of extract writes a shard
        for i in range(n):
            path = tmp_path / "photos" / ("rose", "iris")[i % 2] / f"{i:02d}.png"
            if not path.exists():
                write_photo(path, i)
        out = tlpipe(*EXTRACT, "--quiet")[1]
    return Path(out.splitlines()[-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def served(store):
    opened = open_store(store)
    features = np.asarray(opened.features()).tobytes()
    return opened.ids(), opened.labels().tolist(), opened.splits().tolist(), features


def test_a_whole_store_is_fine_and_the_exit_code_says_so(store, tlpipe):
    code, out, err = tlpipe("verify", store)
    assert code == 0
    assert out.splitlines()[0] == str(store)
    assert "24: 24 with features" in out
    assert "3 with 24 rows" in out
    assert "--content reads every byte" in out
    assert "pixels:4 at hand is the recipe's" in out
    assert out.endswith("No problem was found.\n")
    assert err == ""


def test_content_reads_it_all_and_says_how_the_images_are_checked(store, tlpipe):
    code, out, err = tlpipe("verify", store, "--content")
    assert code == 0
    assert "every byte" in out
    assert f"To check the images too:  {' '.join(['tlpipe', *EXTRACT])}" in err
    assert err.rstrip().endswith("--verify content")
    assert tlpipe("verify", store, "--content", "--quiet")[2] == ""


def test_damage_is_told_with_what_mends_it(store, tlpipe):
    flip(store / "shards" / "000002.h5")
    code, out, _ = tlpipe("verify", store, "--content")
    assert code == 4
    assert "PROBLEM    shards/000002.h5 does not hold the bytes that were committed" in out
    assert "10 samples with features in it." in out
    assert f"mended by  tlpipe verify {store} --repair" in out
    assert "No problem" not in out


def test_after_a_repair_the_command_it_names_redoes_only_what_was_hit(store, tlpipe):
    before = served(store)
    flip(store / "shards" / "000002.h5")
    code, out, err = tlpipe("verify", store, "--repair")
    assert code == 0
    assert "found      shards/000002.h5 does not hold" in out
    assert "repaired   Moved shards/000002.h5 to quarantine/000002.h5." in out
    assert "24: 14 with features, 10 not embedded" in out
    assert "No problem is left." in out
    (again,) = [line.strip() for line in err.splitlines() if "tlpipe extract" in line]
    code, out, err = tlpipe(*shlex.split(again)[1:])
    assert code == 0
    assert out.splitlines()[-1] == str(store)
    assert "14 found in the store, 10 embedded" in err
    assert served(store) == before
    assert tlpipe("verify", store, "--content")[0] == 0


@pytest.mark.parametrize("damage", [flip, Path.unlink], ids=["damaged", "missing"])
def test_a_lost_samples_table_comes_back_and_nothing_is_embedded(store, tlpipe, damage):
    before = served(store)
    damage(store / read_manifest(store).samples.file)
    code, out, _ = tlpipe("inspect", store)
    assert code == 4
    code, out, err = tlpipe("verify", store, "--repair")
    assert code == 0
    assert "24 samples, without labels, splits and their order" in out
    (again,) = [line.strip() for line in err.splitlines() if "tlpipe extract" in line]
    assert again.endswith("--verify content")
    err = tlpipe(*shlex.split(again)[1:])[2]
    assert " 0 embedded" in err
    assert "Nothing was decoded." in err
    assert served(store) == before


@pytest.mark.parametrize("name", [MANIFEST_FILE, BACKUP_FILE, "features.h5"])
def test_other_files_are_mended_without_any_images(store, tlpipe, name):
    before = served(store)
    flip(store / name)
    assert tlpipe("verify", store, "--content")[0] == 4
    assert tlpipe("verify", store, "--repair")[0] == 0
    assert tlpipe("verify", store, "--content")[0] == 0
    assert served(store) == before


def test_json_is_one_document(store, tlpipe):
    flip(store / "shards" / "000003.h5")
    code, out, _ = tlpipe("verify", store, "--content", "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["content"], found["n_shards"]) == (4, False, True, 3)
    assert found["backbone"]["state"] == "same"
    (problem,) = found["problems"]
    assert problem["where"] == "shards/000003.h5"
    assert problem["remedy"] == f"tlpipe verify {store} --repair"
    code, out, _ = tlpipe("verify", store, "--repair", "--json")
    mended = json.loads(out)
    assert (code, mended["ok"], mended["n_pending"]) == (0, True, 4)
    assert mended["found"] == [problem]
    assert mended["repaired"][0] == "Moved shards/000003.h5 to quarantine/000003.h5."
    assert mended["extract"].startswith("tlpipe extract photos")


def test_two_damaged_manifests(store, tlpipe):
    for name in (MANIFEST_FILE, BACKUP_FILE):
        (store / name).write_text("{")
    for option in ((), ("--repair",)):
        code, out, _ = tlpipe("verify", store, *option)
        assert code == 4
        assert f"mended by  mv {store} {store}-damaged" in out
        assert "backbone" not in out


def test_what_is_no_store(store, tlpipe, tmp_path):
    code, out, err = tlpipe("verify", tmp_path)
    assert (code, out) == (4, "")
    assert "is not a feature store" in err
    code, out, err = tlpipe("verify", store / "features.h5")
    assert code == 4
    assert "is a part of a feature store. Give the folder" in out


def test_a_repair_beside_a_writer_exits_6(store, tlpipe):
    with StoreWriter.reopen(store):
        assert tlpipe("verify", store)[0] == 0
        code, _, err = tlpipe("verify", store, "--repair")
    assert code == 6
    assert "is being written by process" in err


# The backbone at hand


def test_other_weights_under_the_old_name_are_a_note_and_no_problem(store, tlpipe, tmp_path):
    from safetensors.torch import save_file

    from pipeline.backbones import load_backbone

    weights = tmp_path / "weights.safetensors"
    first, second = (
        load_backbone("torchvision:squeezenet1_1", weights="random", seed=seed).module.state_dict()
        for seed in (1, 2)
    )
    save_file(first, weights)
    options = ("--backbone", "torchvision:squeezenet1_1", "--weights", weights, "--image-size", 32)
    made = tlpipe("extract", "photos", *options, "--quiet")[1].splitlines()[-1]
    assert "at hand is the recipe's" in tlpipe("verify", made)[1]
    save_file(second, weights)
    code, out, _ = tlpipe("verify", made)
    assert code == 0
    assert "torchvision:squeezenet1_1 at hand is not the recipe's" in out
    (line,) = [line for line in out.splitlines() if " now " in line]
    assert line.strip().startswith("weights: ")
    weights.unlink()
    code, out, _ = tlpipe("verify", made)
    assert code == 0
    assert "not compared: the weights of torchvision:squeezenet1_1 are not at hand." in out


def made_by(store, **origin):
    manifest = read_manifest(store)
    provenance = {**manifest.provenance["backbone"], **origin}
    return replace(manifest, provenance={"backbone": provenance})


def test_nothing_is_downloaded(store, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    origins = [
        {"spec": "resnet18"},
        {"spec": "resnet18", "weights": "IMAGENET1K_V1"},
        {"spec": "timm:resnet18"},
        {"spec": "timm:resnet18", "weights": "a1_in1k"},
    ]
    for origin in origins:
        compared = weights_at_hand(made_by(store, **origin))
        assert compared.state == "unknown"
        assert "are not at hand" in compared.summary
    assert not (tmp_path / "hub").exists()
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("origin", "why"),
    [
        ({"spec": "resnet18x"}, "Unknown backbone 'resnet18x'"),
        ({"spec": 5}, "does not say how its backbone was loaded"),
        ({"more": 1}, "does not say how its backbone was loaded"),
        ({"spec": "pixels:0"}, "is not understood"),
    ],
)
def test_a_backbone_that_cannot_be_had_is_not_compared(store, origin, why):
    compared = weights_at_hand(made_by(store, **origin))
    assert compared.state == "unknown"
    assert why in compared.summary


def test_the_structure_is_checked_without_torch(store):
    program = "import sys; sys.modules['torch'] = None\nfrom pipeline.commands import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "verify", str(store), "--content"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "No problem was found." in done.stdout
    assert "not compared: " in done.stdout
    assert "torch" in done.stdout


# The command that goes on


def test_the_command_that_goes_on_names_what_was_chosen(store):
    manifest = read_manifest(store)
    assert extract_command(store, manifest) == "tlpipe extract photos --backbone pixels:4"
    earlier = replace(manifest, provenance={**manifest.provenance, "asked": None})
    assert extract_command(store, earlier) == (
        "tlpipe extract photos --backbone pixels:4 --precision fp32"
    )
    elsewhere = store.resolve()
    assert f"--cache {shlex.quote(str(elsewhere.parents[1]))}" in extract_command(
        elsewhere, manifest
    )
    recipe = {**manifest.recipe, "layers": ["layer1", "penultimate"], "storage": "float32"}
    more = replace(
        made_by(store, spec="resnet18", weights="my weights.pth", image_size=64, seed=3),
        recipe=recipe,
    )
    words = shlex.split(extract_command(store, more))
    for option, value in {
        "--backbone": "resnet18",
        "--weights": "my weights.pth",
        "--layers": "layer1,penultimate",
        "--image-size": "64",
        "--dtype": "float32",
        "--seed": "3",
    }.items():
        assert words[words.index(option) + 1] == value
    assert "--pooling" not in words


def test_the_command_that_goes_on_finds_a_folder_from_elsewhere(store, tmp_path, monkeypatch):
    manifest = read_manifest(store)
    store = store.resolve()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert shlex.split(extract_command(store, manifest))[2] == str(tmp_path / "photos")
    unknown = replace(manifest, provenance={})
    assert extract_command(store, unknown) == "tlpipe extract DATA"


def test_a_packed_file_is_checked_too(store, tlpipe):
    tlpipe("pack", store, "photos.h5")
    code, out, _ = tlpipe("verify", "photos.h5", "--content")
    assert (code, out.splitlines()) == (
        0, ["photos.h5", "  checked    every byte", "No problem was found."]
    )  # fmt: skip
    flip(Path("photos.h5"))
    code, out, _ = tlpipe("verify", "photos.h5", "--content", "--json")
    assert code == 4
    (problem,) = json.loads(out)["problems"]
    assert "photos.h5" in problem
    assert "tlpipe pack" in problem
    code, _, err = tlpipe("verify", "photos.h5", "--repair")
    assert (code, "not repaired" in err) == (2, True)


@pytest.mark.parametrize("asked", [("--layers", "all"), ("--layers", "layer1,layer4")])
def test_the_printed_command_goes_on_with_the_very_store(tmp_path, monkeypatch, tlpipe, asked):
    """Also where the precision was chosen for the user, as bf16 from some stage on."""
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        write_photo(tmp_path / "photos" / ("rose", "iris")[i % 2] / f"{i:02d}.png", i)
    out = tlpipe("extract", "photos", "--backbone", "resnet18", "--weights", "random",
                 "--image-size", "32", "--quiet", *asked)[1]  # fmt: skip
    store = Path(out.splitlines()[-1])
    command = shlex.split(extract_command(store, read_manifest(store)))
    document = json.loads(tlpipe(*command[1:], "--json")[1])
    assert (document["store"], document["n_cached"]) == (str(store), 6)


def test_what_relabel_had_set_is_asked_for_again_when_the_table_is_lost(store, tlpipe):
    ids = open_store(store).ids()
    rows = "\n".join(f"{sample_id},s{i % 2}" for i, sample_id in enumerate(ids))
    Path("my species.csv").write_text(f"path,species\n{rows}\n", encoding="utf-8")
    assert tlpipe("relabel", store, "my species.csv")[0] == 0
    next(store.glob("samples-*.h5")).unlink()
    code, out, _ = tlpipe("verify", store)
    assert (code, "unknown: the samples table cannot be read" in out) == (4, True)
    code, out, err = tlpipe("verify", store, "--repair")
    assert code == 0
    assert "Labels and splits may be missing until the data is extracted again." in err
    commands = [shlex.split(line) for line in err.splitlines() if line.startswith("  tlpipe ")]
    assert [words[1] for words in commands] == ["extract", "relabel"]
    for words in commands:
        assert tlpipe(*words[1:])[0] == 0
    again = open_store(store)
    assert again.labels("species").tolist() == [f"s{i % 2}" for i in range(len(ids))]
    assert again.labels("label").tolist() == [i.split("/")[0] for i in ids]
