"""FAULTS, data sources: each gives the right samples and a note, or a clear error."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.data import open_source
from pipeline.errors import EmptySourceError, ManifestError


@dataclass
class Fault:
    """Files to make, and what is expected of the source: samples and notes, or an error."""

    files: list[str] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    manifest: str = ""
    ids: list[str] | None = None
    labels: set[str | None] | None = None
    splits: dict[str, str] = field(default_factory=dict)
    note: str = ""
    error: type[Exception] | None = None
    message: str = ""


LONG = "n" * 245

FAULTS = {
    "17 empty folder": Fault(error=EmptySourceError, message="holds no image"),
    "17 folder of folders without images": Fault(
        folders=["a", "b/c"], error=EmptySourceError, message="Found no other file either."
    ),
    "17 split folders without images": Fault(
        folders=["train/a", "test/a"], error=EmptySourceError, message="holds no image"
    ),
    "18 one class only": Fault(
        files=["cat/1.png", "cat/2.png"],
        labels={"cat"},
        note="Only one class, 'cat': a head needs at least two.",
    ),
    "19 class with one sample": Fault(
        files=["a/1.png", "b/1.png", "b/2.png"],
        splits={"a/1.png": "train"},
        note="Class 'a' has one sample: it stays in train, so the test split cannot score it. "
        "Add a second one to have it scored.",
    ),
    "19 classes with one sample": Fault(
        files=["a/1.png", "b/1.png", "c/1.png", "c/2.png"],
        splits={"a/1.png": "train", "b/1.png": "train"},
        note="2 classes have one sample each ('a' and 'b'): they stay in train, so the test split "
        "cannot score them. Add a second sample to have them scored.",
    ),
    "20 class missing from test": Fault(
        files=["train/a/1.png", "train/b/1.png", "test/b/1.png"],
        labels={"a", "b"},
        splits={"test/b/1.png": "test"},
        note="In train but not in test, so not scored there: 'a'.",
    ),
    "20 class missing from val": Fault(
        files=["train/a/1.png", "train/b/1.png", "val/b/1.png", "test/a/1.png", "test/b/1.png"],
        labels={"a", "b"},
        note="In train but not in val, so not scored there: 'a'.",
    ),
    "21 class in test alone": Fault(
        files=["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/c/1.png"],
        labels={"a", "b", "c"},
        note="In test but not in train, so never predicted: 'c'.",
    ),
    "22 empty class folder": Fault(
        files=["a/1.png", "b/1.png", "c/readme.txt"],
        folders=["d"],
        labels={"a", "b"},
        note="2 folders without an image: 'c' and 'd'.",
    ),
    "23 hidden folders": Fault(
        files=[
            "a/1.png",
            "b/1.png",
            ".ipynb_checkpoints/a-checkpoint.png",
            "a/.ipynb_checkpoints/1-checkpoint.png",
            "__MACOSX/a/._1.png",
            "a/._1.png",
            ".DS_Store",
            ".hidden.png",
        ],
        ids=["a/1.png", "b/1.png"],
    ),
    "24 unicode": Fault(
        files=["猫/図.png", "b/1.png"], ids=["b/1.png", "猫/図.png"], labels={"猫", "b"}
    ),
    "24 newline": Fault(files=["a\nb/1\n2.png"], ids=["a\nb/1\n2.png"], labels={"a\nb"}),
    "24 surrogate": Fault(
        files=["a/\udce9.png", "\udcff/1.png"],
        ids=[r"\xff/1.png", r"a/\xe9.png"],
        labels={"a", r"\xff"},
    ),
    "24 very long": Fault(files=[f"{LONG}/{LONG}.png"], ids=[f"{LONG}/{LONG}.png"], labels={LONG}),
    "24 NFC against NFD": Fault(
        files=["a/\u00e9.png", "a/e\u0301.png", "b/1.png"],
        ids=["a/\u00e9.png", "b/1.png"],
        note="1 image left out, since another one has the same name but for its Unicode "
        "composition: 'a/\u00e9.png'. Rename one of each two to keep both.",
    ),
    "25 files that differ by case": Fault(
        files=["a/x.png", "a/X.png", "a/x.PNG"], ids=["a/X.png", "a/x.PNG", "a/x.png"]
    ),
    "25 classes that differ by case": Fault(
        files=["cat/1.png", "Cat/1.png"],
        labels={"cat", "Cat"},
        note="Classes 'Cat' and 'cat' differ only by case: they are kept apart.",
    ),
    "26 link to the folder above": Fault(
        files=["a/1.png", "b/1.png"],
        links={"a/up": "..", "a/here": "."},
        ids=["a/1.png", "b/1.png"],
        note="2 links back to a folder above not followed: every image is listed once.",
    ),
    "26 link to itself": Fault(
        files=["a/1.png"], links={"a/2.png": "2.png", "a/x": "x"}, ids=["a/1.png", "a/2.png"]
    ),
    "26 two folders that link to each other": Fault(
        files=["a/1.png", "b/1.png"],
        links={"a/b": "../b", "b/a": "../a"},
        ids=["a/1.png", "a/b/1.png", "b/1.png", "b/a/1.png"],
    ),
    "26 broken link": Fault(
        files=["a/1.png"], links={"a/2.png": "gone.png"}, ids=["a/1.png", "a/2.png"]
    ),
    "29 byte order mark": Fault(
        manifest="\ufeffpath,label\n1.png,a\n2.png,b\n", ids=["1.png", "2.png"], labels={"a", "b"}
    ),
    "29 missing column": Fault(
        manifest="image,label\n1.png,a\n",
        error=ManifestError,
        message="has no column 'path'. Found: 'image' and 'label'.",
    ),
    "29 blank and NaN labels": Fault(
        manifest="path,label\n1.png,\n2.png,NaN\n3.png,a\n4.png,b\n",
        labels={None, "a", "b"},
        splits={"1.png": "train", "2.png": "train"},
        note="2 samples without a label: embedded, but not used to fit or score a head.",
    ),
    "29 duplicate path": Fault(
        manifest="path,label\n1.png,a\n1.png,a\n2.png,b\n",
        ids=["1.png", "2.png"],
        note="1 row dropped, for a path that was listed before: '1.png'.",
    ),
    "29 duplicate path, other label": Fault(
        manifest="path,label\n1.png,a\n1.png,b\n", error=ManifestError, message="Keep one row"
    ),
    "29 path that leaves the root": Fault(
        manifest="path,label\n1.png,a\n../secret.png,b\n/etc/x.png,b\n",
        error=ManifestError,
        message="    line 3: '../secret.png'\n    line 4: '/etc/x.png'",
    ),
    "32 classes that look like code": Fault(
        files=["=cmd()/1.png", "<script><img onerror=…>/1.png", "[red]/1.png"],
        labels={"=cmd()", "<script><img onerror=…>", "[red]"},
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(tmp_path, monkeypatch, name):
    fault = FAULTS[name]
    monkeypatch.chdir(tmp_path)
    for folder in fault.folders:
        Path(folder).mkdir(parents=True)
    for file in fault.files:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    for link, target in fault.links.items():
        Path(link).symlink_to(target)
    if fault.manifest:
        Path("list.csv").write_text(fault.manifest, encoding="utf-8")
    spec = "list.csv" if fault.manifest else "."

    if fault.error:
        with pytest.raises(fault.error) as error:
            open_source(spec)
        assert fault.message in str(error.value)
        assert error.value.exit_code == 4
        return
    source = open_source(spec)

    ids = [sample.id for sample in source.samples]
    if fault.ids is not None:
        assert ids == fault.ids
    if fault.labels is not None:
        assert {sample.labels[0] for sample in source.samples} == fault.labels
    splits = {sample.id: sample.split for sample in source.samples}
    assert {id: splits[id] for id in fault.splits} == fault.splits
    assert not fault.note or fault.note in source.notes
    assert "".join(ids).encode()  # ids are text that any file can hold
