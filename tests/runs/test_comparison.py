"""Runs side by side: paired on the same samples, costs told, refused where they do not fit."""

import json
from dataclasses import replace

import numpy as np
import pytest
from plotly.graph_objects import Figure

from pipeline.errors import MismatchError, StoreError, UsageError
from pipeline.finetune.by_size import Curve
from pipeline.heads.paired import mcnemar
from pipeline.report.compare import _points, _sizes, compare_page, compare_table, size_words
from pipeline.runs.comparison import Comparison, Contender, compare_runs
from pipeline.runs.folder import RUN_FORMAT, read_run, write_json
from pipeline.sweep.fit import fit_head
from pipeline.sweep.sizes import SizePoint
from pipeline.sweep.sweep import Plan, sweep
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


def test_the_same_folder_by_another_path_is_no_second_run(store, tmp_path):
    path = fitted(store, tmp_path)

    with pytest.raises(UsageError, match="needs two runs or more"):
        compare_runs([path, path / ".." / path.name])


def test_settings_that_were_tried_are_counted(store, tmp_path):
    alone = fitted(store, tmp_path, "prototype", settings=[{}])
    swept = sweep(store, Plan(("ridge", "knn"), grid="quick")).save(tmp_path)

    lines = {line["kind"]: line for line in compare_runs([alone, swept]).lines()}

    n_all = sum(line["n_trials"] for line in read_run(swept)["heads"])
    assert lines["sweep"]["n_tried"] == n_all > 2
    assert lines["sweep"]["search_seconds"] > 0
    assert lines["fit-head"]["n_tried"] == 1


def test_a_comparison_is_no_run_and_names_its_runs(store, tmp_path):
    paths = [fitted(store, tmp_path, head) for head in ("ridge", "knn")]
    document = compare_runs(paths).to_dict() | {"format": RUN_FORMAT, "format_version": 1}
    folder = tmp_path / "compare-0001"
    folder.mkdir()
    write_json(folder / "run.json", document)

    with pytest.raises(UsageError, match="is a comparison itself") as raised:
        compare_runs([folder, paths[0]])

    assert all(str(path) in str(raised.value) for path in paths)


def finetune_run(store, out, **more):
    """A run of another head's predictions, told to be of a training."""
    path = fitted(store, out, "knn")
    run = read_run(path)
    del run["stores"], run["layers"]
    run |= {"kind": "finetune", "policy": "full", "backbone": {"name": "net"}, "lr_trials": []}
    write_json(path / "run.json", run | {"settings": {}, **more})
    return path


def test_a_training_costs_the_extraction_and_the_fit_of_the_head_it_started_from(store, tmp_path):
    with_cost(store, seconds=60.0)
    frozen = fitted(store, tmp_path)
    plain = finetune_run(store, tmp_path)
    from_head = finetune_run(store, tmp_path, stores=[str(store.path)], head_seconds=5.0)
    gone = finetune_run(store, tmp_path, stores=[str(tmp_path / "gone")])
    embedding = {"stores": [str(store.path)], "seconds": {"embed": 61.0, "total": 70.0}}
    embedded = finetune_run(store, tmp_path, **embedding)

    found = compare_runs([frozen, plain, from_head, gone, embedded])
    lines = {line["path"]: line for line in found.lines()}

    costs = {path: lines[str(path)]["extract_seconds"] for path in (frozen, plain, from_head, gone)}
    assert costs == {frozen: 60.0, plain: 0.0, from_head: 60.0, gone: None}
    own = read_run(from_head)["seconds"]["total"]
    assert lines[str(from_head)]["fit_seconds"] == own + 5.0
    assert lines[str(from_head)]["total_seconds"] == own + 65.0
    assert lines[str(embedded)]["total_seconds"] == 60.0 + 9.0


def test_trainings_that_started_elsewhere_say_where(store, tmp_path):
    paths = [
        finetune_run(store, tmp_path / "runs", head_start=start)
        for start in ("runs/x/ridge-net-0001", "fresh", "fresh")
    ]

    assert {line["name"] for line in compare_runs(paths).lines()} == {
        "fine-tuning, full from ridge-net-0001 (net)", "fine-tuning, full from a fresh head (net)"
    }  # fmt: skip
    assert {line["name"] for line in compare_runs(paths[1:]).lines()} == {"fine-tuning, full (net)"}


def with_cost(store, seconds):
    """Have the store say that embedding all of it took so long."""
    cost = {"seconds": seconds, "n_embedded": len(store)}
    provenance = store.manifest.provenance | {"cost": cost}
    replace(store.manifest, provenance=provenance).write(store.path)


def test_labels_that_were_scored_on_different_splits_say_where(tmp_path):
    labels = cycle("abc", 90)
    side = [None if i >= 60 else "xy"[i % 2] for i in range(90)]
    store = make_store(
        tmp_path / "s", {"penultimate": blobs(labels)}, {"kind": labels, "side": side},
        splits_of(40, 20, 30),
    )  # fmt: skip
    paths = [
        fitted(store, tmp_path, head, label=label)
        for label in ("kind", "side")
        for head in ("ridge", "knn")
    ]

    document = compare_runs(paths).to_dict()
    columns, _ = compare_table(document)

    names = {line["name"].rpartition("), ")[2] for line in document["lines"]}
    assert names == {"kind, on test", "side, on val"}
    assert columns[1] == "top-1 [95 %]"
    assert "side: scored on val" in compare_page(document)


# The verdict

CURVE = [
    {"epoch": epoch, "seconds": seconds, "val_top1": value}
    for epoch, seconds, value in ((0, 0.0, 0.123), (1, 3.0, 0.456), (2, 6.0, 0.97), (3, 9.0, 0.99))
]


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
        "curve": CURVE if policy else [],
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


def test_the_page_draws_a_head_trained_on_a_frozen_network_as_frozen():
    runs = [contender("full", 930, policy="full"), contender("x", 910, policy="head")]
    document = Comparison([*runs, contender("logreg", 900)], []).to_dict()
    figure = Figure()

    _points(figure, document["lines"])

    assert {trace.name: list(trace.y) for trace in figure.data} == {
        "frozen features": [0.91, 0.9], "trained network": [0.93]
    }  # fmt: skip
    assert "<h1>Frozen or fine-tuned: " in compare_page(document)


def test_scratch_says_what_transfer_is_worth():
    said = verdict(
        contender("full", 930, policy="full"), contender("logreg", 900),
        contender("scratch", 500, policy="scratch"),
    )  # fmt: skip

    assert "Training from scratch reaches 0.500, 43.0 [" in said
    assert "that is what transfer is worth here" in said


@pytest.mark.parametrize(
    ("n_right", "words"),
    [
        (905, "cannot be told from fine-tuning, full (net): here transfer is worth no more than"),
        (960, "points more than fine-tuning, full (net): the pretrained weights hurt here."),
    ],
)
def test_scratch_that_is_as_good_or_better_is_called_so(n_right, words):
    said = verdict(
        contender("full", 900, policy="full"), contender("scratch", n_right, policy="scratch")
    )

    assert words in said
    assert "what transfer is worth" not in said


def test_the_page_has_start_slope_and_asymptote_in_numbers_and_the_confusion_of_the_best():
    confusion = {"classes": ["cat", "dog"], "counts": [[3, 1], [0, 4]]}
    tuned = contender("full", 930, policy="full", confusion=confusion)
    other = contender("logreg", 900, confusion={"classes": ["cow"], "counts": [[8]]})

    page = compare_page(Comparison([tuned, other], []).to_dict())

    cells = "<td>0.123</td><td>0.456</td><td>0.990</td><td>3</td><td>6.0 s</td>"
    assert cells in page
    assert "Confusion on test of the best on validation, fine-tuning, full (net)" in page
    assert '"cow"' not in page


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
    assert "x failed: y" in html


def test_points_of_one_draw_have_no_error_bar_and_say_so():
    points = (SizePoint(2, 6, (0.7, 0.8, 0.9)), SizePoint(96, 288, (0.95,)))
    curve = Curve("full", "each of 2 epochs", points, 3, 4.0).to_dict()
    figure = Figure()

    _sizes(figure, [curve])

    assert size_words(curve) == (
        "full, accuracy by training samples a class (mean ± 95 % over draws of samples): "
        "2: 0.800 ± 0.248, 96: 0.950 (1 draw). Beside the table: 3 fits in 4.0 s, each of 2 epochs."
    )
    above, below = figure.data[0].error_y.array, figure.data[0].error_y.arrayminus
    # High ends at 1: that side is shorter.
    assert (above[0], below[0]) == (pytest.approx(0.2), pytest.approx(0.248, abs=1e-3))
    assert (above[1], below[1]) == (None, None)


def test_gpu_time_is_a_column_where_a_gpu_took_part():
    tuned = contender("full", 930, policy="full", device="NVIDIA H200", n_processes=2)
    document = Comparison([tuned, contender("logreg", 900)], []).to_dict()

    columns, rows = compare_table(document)

    assert document["lines"][0]["device_seconds"] == 2 * tuned.fit_seconds
    assert columns[-1] == "GPU time"
    assert rows[0][-1].endswith(" NVIDIA H200")
    assert rows[1][-1] == "none"
