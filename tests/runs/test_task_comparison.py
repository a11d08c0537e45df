"""Runs of several label columns beside others: a line a column, paired within the column."""

import json

import numpy as np
import pytest

from pipeline.errors import MismatchError, StoreError
from pipeline.heads.paired import mcnemar
from pipeline.report.compare import compare_page, compare_table
from pipeline.runs.comparison import compare_runs, read_contenders
from pipeline.sweep.fit import fit_head
from pipeline.sweep.multitask import fit_multitask
from tests.heads.toy_stores import blobs, cycle, make_store, splits_of

SETTINGS = [{"hidden": 8, "epochs": 3}]


@pytest.fixture
def store(tmp_path):
    kind = cycle("abc", 120)
    side = [None if i % 5 == 0 else "xy"[i % 2] for i in range(120)]
    X = blobs([f"{k}{i % 2}" for i, k in enumerate(kind)], noise=1.0)
    columns = {"kind": kind, "side": side, "other": cycle("pq", 120)}
    return make_store(tmp_path / "s", {"penultimate": X}, columns, splits_of(80, 0, 40))


@pytest.fixture
def both(store, tmp_path):
    return fit_multitask(store, ["kind", "side"], settings=SETTINGS).save(tmp_path / "runs")


def single(store, tmp_path, label, head="ridge"):
    return fit_head(store, head=head, label=label).save(tmp_path / "runs")


def test_a_line_for_each_column_paired_with_lines_of_the_same(store, both, tmp_path):
    paths = [both, *(single(store, tmp_path, label) for label in ("side", "kind"))]

    found = compare_runs(paths)

    lines = found.lines()
    assert [line["label"] for line in lines] == ["kind", "kind", "side", "side"]
    assert all(line["name"].endswith(f", {line['label']}") for line in lines)
    assert ["difference" in line for line in lines] == [False, True, False, True]
    for above, below in (found.contenders[:2], found.contenders[2:]):
        assert above.top1.value >= below.top1.value
        assert above.right.keys() == below.right.keys()
        ids = sorted(above.right)
        right = [np.array([c.right[i] for i in ids]) for c in (below, above)]
        line = next(one for one in lines if one["name"] == below.name)
        assert line["p_value"] == mcnemar(*right)
    assert found.verdict().startswith("kind: The best on validation is ")
    assert " side: The best on validation is " in found.verdict()


def test_a_column_learned_with_others_is_of_the_same_data(store, both, tmp_path):
    found = compare_runs([both, single(store, tmp_path, "side")])

    assert not any("not fitted on the same" in note for note in found.notes)


def test_the_table_and_the_page_have_every_column(store, both, tmp_path):
    found = compare_runs([both, single(store, tmp_path, "side")])
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))

    _, rows = compare_table(document)

    assert len(rows) == 3
    assert "side" in compare_page(document)


def test_the_name_of_a_run_of_one_column_is_as_ever(store, tmp_path):
    found = compare_runs([single(store, tmp_path, "kind", head) for head in ("ridge", "knn")])

    assert not any(line["name"].endswith("kind") for line in found.lines())


def test_a_run_that_shares_no_column_is_refused(store, both, tmp_path):
    other = single(store, tmp_path, "other")

    with pytest.raises(MismatchError, match=r"learned the label 'kind [+] side', but .* 'other'"):
        compare_runs([both, other])


def test_a_column_that_was_not_scored_has_no_line(tmp_path):
    kind = ["a", "b", "c", *cycle("abc", 30)]
    side = ["x", "y", "x", *[None] * 30]
    made = make_store(
        tmp_path / "s", {"penultimate": blobs(kind)}, {"kind": kind, "side": side},
        splits_of(3, 0, 30),
    )  # fmt: skip
    path = fit_multitask(made, ["kind", "side"], settings=SETTINGS).save(tmp_path / "runs")

    assert [contender.label for contender in read_contenders(path)] == ["kind"]


def test_missing_predictions_are_named(both):
    (both / "predictions-side.csv").unlink()

    with pytest.raises(StoreError, match=r"predictions-side\.csv cannot be read"):
        read_contenders(both)
