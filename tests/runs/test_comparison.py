"""Runs side by side: paired on the same samples, costs told, refused where they do not fit."""

import json

import numpy as np
import pytest

from pipeline.errors import MismatchError, StoreError, UsageError
from pipeline.heads.paired import mcnemar
from pipeline.report.compare import compare_page, compare_table
from pipeline.runs.comparison import Comparison, Contender, compare_runs
from pipeline.sweep.fit import fit_head
from tests.heads.toy_stores import blobs, cycle, make_store, splits_of


@pytest.fixture
def store(tmp_path):
    labels = cycle("abc", 120)
    columns = {"label": labels, "other": cycle("xy", 120)}
    return make_store(
        tmp_path / "s", {"penultimate": blobs(labels, noise=1.2)}, columns, splits_of(80, 0, 40)
    )


def fitted(store, out, head="ridge", **options):
    return fit_head(store, head=head, **options).save(out)


def test_the_most_accurate_comes_first_and_each_is_paired_with_the_one_above(store, tmp_path):
    paths = [fitted(store, tmp_path, head) for head in ("prototype", "ridge", "knn")]

    found = compare_runs(paths)

    values = [c.top1.value for c in found.contenders]
    assert values == sorted(values, reverse=True)
    lines = found.lines()
    assert "difference" not in lines[0]
    for above, line in zip(found.contenders, lines[1:], strict=False):
        own = next(c for c in found.contenders if c.path == line["path"])
        ids = sorted(own.right)
        right = [np.array([c.right[i] for i in ids]) for c in (own, above)]
        assert line["p_value"] == mcnemar(*right)
        assert line["difference"]["value"] == pytest.approx(own.top1.value - above.top1.value)
    json.dumps(found.to_dict(), allow_nan=False)


def test_parameters_and_costs_are_told(store, tmp_path):
    ridge, knn = (fitted(store, tmp_path, head) for head in ("ridge", "knn"))

    lines = {line["name"].split()[0]: line for line in compare_runs([ridge, knn]).lines()}

    assert lines["ridge"]["n_trained"] == 3 * 8 + 3
    assert lines["knn"]["n_trained"] == 0
    assert lines["ridge"]["fit_seconds"] > 0
    # The toy store was made by no extraction, so that nobody knows what it took.
    assert lines["ridge"]["extract_seconds"] is None
    assert lines["ridge"]["total_seconds"] is None


def test_runs_of_other_labels_or_samples_are_refused(store, tmp_path):
    first = fitted(store, tmp_path)
    other = fitted(store, tmp_path, label="other")
    smaller = make_store(
        tmp_path / "t", {"penultimate": blobs(cycle("abc", 100))}, {"label": cycle("abc", 100)},
        splits_of(80, 0, 20),
    )  # fmt: skip

    with pytest.raises(MismatchError, match=r"learned the label 'label', but .* learned 'other'"):
        compare_runs([first, other])
    with pytest.raises(MismatchError, match=r"scored on 40 samples and .* on 20, .* share 20"):
        compare_runs([first, fitted(smaller, tmp_path)])


def test_one_run_twice_is_no_comparison(store, tmp_path):
    path = fitted(store, tmp_path)

    with pytest.raises(UsageError, match="needs two runs or more"):
        compare_runs([path, path])
    with pytest.raises(StoreError, match="is not a run"):
        compare_runs([path, tmp_path])


def test_other_training_data_is_warned_about(store, tmp_path):
    labels = cycle("abc", 120)
    labels[0] = "c"
    relabelled = make_store(
        tmp_path / "u", {"penultimate": blobs(cycle("abc", 120), noise=1.2)}, {"label": labels},
        splits_of(80, 0, 40),
    )  # fmt: skip

    found = compare_runs([fitted(store, tmp_path), fitted(relabelled, tmp_path)])

    assert any("not fitted on the same training samples" in note for note in found.notes)


# The verdict


def contender(name, n_right, *, policy=None, seconds=10.0, extract=90.0, val=None, n=1000, **more):
    """A run that has its first ``n_right`` of n samples right."""
    value = n_right / n
    score = {"value": value, "low": value - 0.01, "high": value + 0.01}
    run = {
        "kind": "finetune" if policy else "fit-head",
        "head": name,
        "label": "label",
        "policy": policy,
        "layers": [["penultimate"]],
        "stores": ["cache/x/net-12345678"],
        "backbone": {"name": "net"},
        "metrics": {"test": {"top1": score}, "val": {"top1": score | {"value": val or value}}},
        "scored_on": "test",
        "seconds": {"total": seconds},
        "chosen_by": "val",
        "n_samples": {"train": 1, "val": 0, "test": n},
        "split_origin": "given",
        "curve": [{"seconds": 1.0, "val_top1": 0.5}] if policy else [],
        **more,
    }
    right = {str(i): i < n_right for i in range(n)}
    return Contender(f"runs/{name}", run, right, 0.0 if policy else extract)


def verdict(*contenders):
    return Comparison(list(contenders), []).verdict()


def test_a_gain_is_told_with_its_interval_and_its_price():
    said = verdict(contender("full", 930, policy="full", seconds=4100.0), contender("logreg", 900))

    assert said.startswith("Fine-tuning, full (net) gains 3.0 [")
    assert "against the best frozen head, logreg (net, penultimate), for 41× the time" in said


def test_a_difference_within_chance_is_called_so():
    said = verdict(contender("full", 901, policy="full"), contender("logreg", 900))

    assert "cannot be told from the best frozen head" in said
    assert "gains" not in said


def test_a_loss_is_called_a_loss():
    said = verdict(contender("logreg", 950), contender("full", 900, policy="full"))

    assert "Fine-tuning, full (net) loses 5.0 [" in said


def test_validation_picks_whom_the_verdict_is_about():
    said = verdict(
        contender("knn", 905, val=0.80), contender("logreg", 900, val=0.90),
        contender("full", 940, policy="full"),
    )  # fmt: skip

    assert "best frozen head, logreg" in said


def test_a_head_trained_on_a_frozen_network_is_frozen():
    assert not contender("x", 900, policy="head").is_tuned
    assert contender("x", 900, policy="last:1").is_tuned


def test_scratch_says_what_transfer_is_worth():
    said = verdict(
        contender("full", 930, policy="full"), contender("logreg", 900),
        contender("scratch", 500, policy="scratch"),
    )  # fmt: skip

    assert "Training from scratch reaches 0.500, 43.0 [" in said
    assert "that is what transfer is worth here" in said


def test_page_and_table_show_every_line():
    found = Comparison(
        [contender("full", 930, policy="full"), contender("<img src=x>", 900)], ["a note"]
    )
    document = found.to_dict() | {"sizes": {}, "command": "tlpipe compare", "failures": {"x": "y"}}

    html = compare_page(document)
    columns, rows = compare_table(document)

    assert len(rows) == 2
    assert {len(row) for row in rows} == {len(columns)}
    assert "<img" not in html.replace("&lt;img", "").split("<body>")[1].split("<script")[0]
    assert "a note" in html
    assert "x has no run: y" in html


def test_gpu_time_is_a_column_where_a_gpu_took_part():
    tuned = contender("full", 930, policy="full", device="NVIDIA H200", n_processes=2)
    document = Comparison([tuned, contender("logreg", 900)], []).to_dict()

    columns, rows = compare_table(document)

    assert document["lines"][0]["device_seconds"] == 2 * tuned.fit_seconds
    assert columns[-1] == "GPU time"
    assert rows[0][-1].endswith(" NVIDIA H200")
    assert rows[1][-1] == "none"
