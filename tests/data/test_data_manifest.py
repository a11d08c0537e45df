"""CSV and Parquet manifests: the same rows give the same samples, and slips are named by line."""

import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import open_source
from pipeline.errors import EmptySourceError, ManifestError, UsageError


def write_csv(folder, text, name="pets.csv", encoding="utf-8"):
    file = folder / name
    file.write_bytes(text.encode(encoding))
    return str(file)


def write_parquet(folder, **columns):
    file = folder / "pets.parquet"
    pq.write_table(pa.table(columns), file)
    return str(file)


def rows(source):
    return [(sample.id, *sample.labels) for sample in source.samples]


def test_a_manifest_keeps_its_order_labels_and_splits(tmp_path):
    spec = write_csv(
        tmp_path, "path,label,split\nb.png,dog,train\na.png,cat,Validation\nc.png,cat,TEST\n"
    )

    source = open_source(spec)

    assert source.name == "pets"
    assert source.layout == "manifest"
    assert source.root == tmp_path
    assert source.label_columns == ("label",)
    assert rows(source) == [("b.png", "dog"), ("a.png", "cat"), ("c.png", "cat")]
    assert [sample.split for sample in source.samples] == ["train", "val", "test"]
    assert source.samples[0].file == str(tmp_path / "b.png")
    assert source.split_origin == "given"


def test_every_other_column_is_a_label_column(tmp_path):
    spec = write_csv(tmp_path, "breed,path,label,split\npug,1.png,dog,\nmanx,2.png,cat,\n")

    source = open_source(spec)

    assert source.label_columns == ("breed", "label")
    assert rows(source) == [("1.png", "pug", "dog"), ("2.png", "manx", "cat")]


def test_the_split_is_stratified_by_the_column_called_label(tmp_path):
    lines = [f"{i},{i}.png,{'cat' if i % 2 else 'dog'}" for i in range(20)]
    spec = write_csv(tmp_path, "\n".join(["number,path,label", *lines]))

    source = open_source(spec)

    held_out = [sample.labels[1] for sample in source.samples if sample.split == "test"]
    assert sorted(held_out) == ["cat", "cat", "dog", "dog"]


def test_a_manifest_without_labels_is_unlabelled(tmp_path):
    source = open_source(write_csv(tmp_path, "path\n1.png\n2.png\n"))

    assert source.label_columns == ()
    assert [(s.labels, s.split) for s in source.samples] == [((), ""), ((), "")]


def test_paths_start_at_the_root_that_is_given(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").touch()
    spec = write_csv(tmp_path, f"path,label\n1.png,a\n{tmp_path}/images/sub/2.png,b\n")

    source = open_source(spec, root=tmp_path / "images")

    assert source.root == tmp_path / "images"
    assert rows(source) == [("1.png", "a"), ("sub/2.png", "b")]
    assert source.samples[1].file == str(tmp_path / "images" / "sub" / "2.png")


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffpath,label\n1.png,a\n2.png,b\n",
        "path;label\n1.png;a\n2.png;b\n",
        "path\tlabel\r\n1.png\ta\r\n2.png\tb\r\n",
        "Path, label\n1.png, a\n\n2.png, b\n\n",
        ",path,label\n0,1.png,a\n1,2.png,b\n",
        'path,"label"\n"1.png","a"\n./2.png,b',
        "path,label\nx/../1.png,a\n.//2.png,b\n",
    ],
    ids=["BOM", "semicolons", "tabs", "spaces and blank lines", "row numbers", "quotes", "dots"],
)
def test_ways_to_write_the_same_csv(tmp_path, text):
    assert rows(open_source(write_csv(tmp_path, text))) == [("1.png", "a"), ("2.png", "b")]


def test_parquet_and_csv_agree_on_every_label(tmp_path):
    paths = ["1.png", "2.png", "3.png", "4.png"]
    of_ints = write_parquet(tmp_path, path=paths, label=[1, 2, 1, None])
    from_ints = rows(open_source(of_ints))
    of_floats = write_parquet(tmp_path, path=paths, label=[1.0, 2.0, 1.0, float("nan")])
    from_floats = rows(open_source(of_floats))
    of_text = write_csv(tmp_path, "path,label\n1.png,1\n2.png,2\n3.png, 1 \n4.png,\n")
    from_text = rows(open_source(of_text))
    of_float_text = write_csv(tmp_path, "path,label\n1.png,1.0\n2.png,2.0\n3.png,1.0\n4.png,NaN\n")
    from_float_text = rows(open_source(of_float_text))

    expected = [("1.png", "1"), ("2.png", "2"), ("3.png", "1"), ("4.png", None)]
    assert from_ints == from_floats == from_text == from_float_text == expected


def test_fractions_stay_fractions(tmp_path):
    spec = write_parquet(tmp_path, path=["1.png", "2.png"], label=[1.0, 1.5])

    assert rows(open_source(spec)) == [("1.png", "1"), ("2.png", "1.5")]


def test_parquet_columns_that_hold_no_text_are_left_out(tmp_path):
    spec = write_parquet(tmp_path, path=["1.png"], label=["a"], image=[{"bytes": b"x"}], raw=[b"x"])

    source = open_source(spec)

    assert source.label_columns == ("label",)
    assert "Columns 'image' and 'raw' hold no text or numbers: left out." in source.notes


def test_missing_labels_are_none_noted_and_never_held_out(tmp_path):
    lines = [f"{i}.png,{'' if i < 5 else 'ab'[i % 2]}" for i in range(25)]

    source = open_source(write_csv(tmp_path, "\n".join(["path,label", *lines])))

    assert [sample.split for sample in source.samples[:5]] == ["train"] * 5
    assert [sample.labels for sample in source.samples[:5]] == [(None,)] * 5
    assert any(note.startswith("5 samples without a label") for note in source.notes)


def test_rows_without_a_split_belong_to_none(tmp_path):
    spec = write_csv(tmp_path, "path,label,split\n1.png,a,train\n2.png,a,\n3.png,a,test\n")

    source = open_source(spec)

    assert [sample.split for sample in source.samples] == ["train", "", "test"]
    assert any(note.startswith("1 sample in no split") for note in source.notes)


def test_a_row_given_twice_is_dropped(tmp_path):
    spec = write_csv(tmp_path, "path,label\n1.png,a\n2.png,b\n./1.png,a\n")

    source = open_source(spec)

    assert rows(source) == [("1.png", "a"), ("2.png", "b")]
    assert "1 row dropped, for a path that was listed before: '1.png'." in source.notes


def test_windows_separators_are_understood(tmp_path):
    source = open_source(write_csv(tmp_path, "path,label\ncats\\1.png,a\ndogs\\2.png,b\n"))

    assert rows(source) == [("cats/1.png", "a"), ("dogs/2.png", "b")]
    assert "Backslashes in paths taken as '/'." in source.notes


def test_accents_are_spelt_as_on_disk(tmp_path):
    (tmp_path / "cafe\u0301.png").touch()

    (sample,) = open_source(write_csv(tmp_path, "path,label\ncaf\u00e9.png,a\n")).samples

    assert sample.id == "caf\u00e9.png"
    assert sample.file == str(tmp_path / "cafe\u0301.png")


def test_a_few_missing_files_pass_but_none_at_all_is_noted(tmp_path):
    spec = write_csv(tmp_path, "path,label\n1.png,a\n2.png,b\n")
    noted = open_source(spec).notes
    (tmp_path / "2.png").touch()
    quiet = open_source(spec).notes

    assert any(f"is {tmp_path} the folder that the paths start from?" in note for note in noted)
    assert not any("looked for" in note for note in quiet)


BAD = {
    "no path column": (
        "image,label\n1.png,a\n",
        "has no column 'path'. Found: 'image' and 'label'.",
    ),
    "no content": ("", "is empty. Expected a header line, such as: path,label,split"),
    "too few fields": (
        "path,label\n1.png\n2.png,b\n",
        "the header has 2 fields, but line 2 has 1 field.",
    ),
    "a comma in a name": (
        "path,label\n1.png,a\nrose, red.png,b\n",
        "the header has 2 fields, but line 3 has 3 fields.\n"
        "  Put a name with a comma in it between double quotes.",
    ),
    "an open quote": ('path,label\n"1.png,a\n', "is not valid CSV: unexpected end of data."),
    "two columns of one name": (
        "path,label,label\n1.png,a,b\n",
        "has more than one column called 'label'.",
    ),
    "no path": ("path,label\n1.png,a\n ,b\n", "has no path in line 3."),
    "another split": (
        "path,split\n1.png,train\n2.png,extra\n",
        "line 3: the split is 'extra'. Expected 'train', 'val' or 'test', or nothing.\n"
        "  Unknown splits in the file: 'extra'.",
    ),
    "above the root": (
        "path,label\n1.png,a\n../2.png,b\nx/../../3.png,b\n",
        "    line 3: '../2.png'\n    line 4: 'x/../../3.png'",
    ),
    "somewhere else": ("path,label\n/etc/1.png,a\n", "1 path not below the root"),
    "the root itself": ("path,label\n.,a\n", "1 path not below the root"),
    "a drive": ("path,label\nC:\\cats\\1.png,a\n", "line 2: 'C:\\\\cats\\\\1.png'"),
    "a URL": ("path,label\nhttps://example.org/1.png,a\n", "line 2: 'https://example.org/1.png'"),
    "two labels for one path": (
        "path,label\n1.png,cat\n2.png,dog\n1.png,dog\n",
        "1 path given twice with other labels or another split:\n"
        "    line 2: '1.png': 'cat'\n    line 4: '1.png': 'dog'\n  Keep one row of each path.",
    ),
    "a path in train and test": (
        "path,label,split\n1.png,cat,train\n1.png,cat,test\n",
        "line 2: '1.png': 'cat' in train\n    line 3: '1.png': 'cat' in test",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_slips_are_named_with_their_line(tmp_path, name):
    text, message = BAD[name]
    spec = write_csv(tmp_path, text)

    with pytest.raises(ManifestError) as error:
        open_source(spec)

    assert error.value.exit_code == 4
    assert str(error.value).startswith(spec)
    assert message in str(error.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_says_how_to_save(tmp_path, encoding):
    spec = write_csv(tmp_path, "path,label\ncaf\u00e9.png,a\n", encoding=encoding)

    with pytest.raises(ManifestError, match=r"is not UTF-8 text .*\n.*CSV UTF-8"):
        open_source(spec)


def test_a_header_without_rows_is_an_empty_source(tmp_path):
    with pytest.raises(EmptySourceError, match="lists no image: it has a header, but no row"):
        open_source(write_csv(tmp_path, "path,label\n"))


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    file = tmp_path / "x.parquet"
    file.write_bytes(b"not parquet at all")

    with pytest.raises(ManifestError, match=r"x\.parquet is not a readable Parquet file"):
        open_source(str(file))


def test_parquet_text_that_is_not_utf8_is_named(tmp_path):
    spec = write_parquet(tmp_path, path=["1.png", "2.png"], label=["train", "x"])
    (tmp_path / "pets.parquet").write_bytes(
        (tmp_path / "pets.parquet").read_bytes().replace(b"train", b"tra\xff\xff")
    )

    with pytest.raises(ManifestError, match=r"pets\.parquet is not a readable Parquet file"):
        open_source(spec)


def test_parquet_rows_are_named_by_number(tmp_path):
    spec = write_parquet(tmp_path, path=["1.png", None], label=["a", "b"])

    with pytest.raises(ManifestError, match="has no path in row 2"):
        open_source(spec)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    spec = write_parquet(tmp_path, path=["1.png"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    with pytest.raises(ManifestError) as error:
        open_source(spec)

    assert "pip install 'tlpipe[parquet]'" in str(error.value)


def test_a_root_that_is_no_folder_is_refused(tmp_path):
    spec = write_csv(tmp_path, "path\n1.png\n")

    with pytest.raises(UsageError, match="is not a folder"):
        open_source(spec, root=tmp_path / "nowhere")


def test_a_root_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is no manifest"):
        open_source(str(tmp_path), root=tmp_path)
