"""Heads fitted by passes over stored rows are those that are fitted in memory."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import logsumexp

from pipeline.heads import HEADS, make_head
from pipeline.heads.metrics import evaluate
from pipeline.heads.scaling import fit_scaler
from pipeline.heads.streaming.fit import MemoryPlan, StreamedFit, can_stream
from pipeline.heads.streaming.footprint import FitSize, held_bytes
from pipeline.heads.streaming.moments import Parts, gather
from pipeline.heads.streaming.outcomes import Outcomes
from pipeline.heads.streaming.rows import StoredRows
from pipeline.sweep.prepare import plan
from tests.heads.toy_stores import blobs, cycle, make_store, splits_of

N = 400
WIDTHS = (16,)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """400 samples of four classes, with features that are far from standardised."""
    labels = cycle("abcd", N)
    X = 3 + blobs(labels, n_features=16, noise=1.5) * np.geomspace(0.1, 10, 16)
    folder = tmp_path_factory.mktemp("stores") / "s"
    make_store(folder, {"penultimate": X}, {"label": labels}, splits_of(N))
    return plan(folder)


@pytest.fixture
def parts(data):
    """Five parts: the first in every fit, the others left out of one each."""
    numbers = np.random.default_rng(0).integers(0, 5, N).astype(np.int8)
    return Parts(data.codes, numbers, 5, 4)


def streamed(data, parts, name, settings, *, kind="standardise", block_rows=90, dtype=np.float64,
             held_rows=1000, n_problems=8):  # fmt: skip
    memory = MemoryPlan(0, block_rows, n_problems, dtype, held_rows)
    features = data.inputs.features
    return StreamedFit(name, features, parts, kind, WIDTHS, settings, memory)


def objective(head, X, y):
    scores = X @ head.coef_.T.astype(np.float64) + head.intercept_
    losses = logsumexp(scores, axis=1) - scores[np.arange(len(y)), y]
    return head.C * losses.sum() + 0.5 * np.square(head.coef_).sum()


@pytest.mark.parametrize("block_rows", [1, 7, 400, 10_000])
def test_a_pass_gives_every_wanted_row_once_with_its_features(data, block_rows):
    rows = StoredRows(data.inputs.features, block_rows)
    wanted = np.arange(N) % 3 == 0
    seen = list(rows.blocks(wanted))

    samples = np.concatenate([own for own, _ in seen])
    assert sorted(samples) == np.flatnonzero(wanted).tolist()
    np.testing.assert_array_equal(np.concatenate([X for _, X in seen]), data.inputs.X[samples])
    assert max(len(own) for own, _ in seen) <= block_rows
    assert rows.n_passes == 1


@pytest.mark.parametrize("n_rows", [1, 50, 10_000])
def test_joined_blocks_hold_as_many_rows_as_were_asked_for(data, n_rows):
    rows = StoredRows(data.inputs.features, 30)
    wanted = np.arange(N) % 3 == 0
    seen = list(rows.gathered(wanted, n_rows))

    samples = np.concatenate([own for own, _ in seen])
    assert sorted(samples) == np.flatnonzero(wanted).tolist()
    np.testing.assert_array_equal(np.concatenate([X for _, X in seen]), data.inputs.X[samples])
    assert all(n_rows <= len(own) < n_rows + 30 for own, _ in seen[:-1])
    assert rows.n_passes == 1


@pytest.mark.parametrize("n_rows", [64, 100, 10_000])
def test_shuffled_blocks_give_every_wanted_row_once_from_everywhere(data, n_rows):
    rows = StoredRows(data.inputs.features, 30)
    wanted = np.arange(N) % 5 > 0
    rng = np.random.default_rng(0)
    first, again = (list(rows.shuffled(wanted, n_rows, rng)) for _ in range(2))

    samples = np.concatenate([own for own, _ in first])
    assert sorted(samples) == np.flatnonzero(wanted).tolist()
    np.testing.assert_array_equal(np.concatenate([X for _, X in first]), data.inputs.X[samples])
    assert all(len(own) == n_rows for own, _ in first[:-1])
    assert all((np.diff(own) > 0).all() for own, _ in first)
    if n_rows < N:
        assert not np.array_equal(samples, np.concatenate([own for own, _ in again]))
        assert any(np.ptp(own) > 2 * n_rows for own, _ in first)
    assert rows.n_passes == 2


def test_rows_that_nobody_wants_are_no_blocks(data):
    assert list(StoredRows(data.inputs.features, 50).blocks(np.zeros(N, dtype=bool))) == []


def test_order_of_the_files_is_followed(tmp_path):
    features = {"penultimate": np.arange(24.0).reshape(12, 2)}
    made = make_store(tmp_path / "s", features, {"label": cycle("ab", 12)}, splits_of(12))
    inputs = plan(made).inputs
    backwards = type(inputs.features)(
        inputs.features.stores, inputs.features.layers, (inputs.features.rows[0][::-1],)
    )

    (first, X), *_ = StoredRows(backwards, 5).blocks(np.ones(12, dtype=bool))

    assert first.tolist() == [11, 10, 9, 8, 7]
    np.testing.assert_array_equal(X, features["penultimate"][:5])


def test_moments_are_those_of_all_rows_at_once(data, parts):
    from pipeline.heads.scaling import Scaler

    weights = np.random.default_rng(1).uniform(0, 2, (2, 5, 4))
    weights[1, 2] = 0
    rows = StoredRows(data.inputs.features, 70)
    X = data.inputs.X.astype(np.float64)

    found = gather(rows, parts, Scaler("none", WIDTHS), weights)

    centred = X - found.shift
    own = weights[:, parts.numbers, parts.codes]
    for gram, weight in zip(found.grams, own, strict=True):
        np.testing.assert_allclose(np.triu(gram), np.triu((centred.T * weight) @ centred))
    for part in range(5):
        for code in range(4):
            here = (parts.numbers == part) & (parts.codes == code)
            np.testing.assert_allclose(found.sums[part, code], centred[here].sum(axis=0))
    expected = fit_scaler(data.inputs.X[parts.numbers != 1], "standardise")
    scaler = found.scaler("standardise", WIDTHS, [0, 2, 3, 4])
    np.testing.assert_allclose(scaler.mean, expected.mean)
    np.testing.assert_allclose(scaler.scale, expected.scale)


def test_constant_feature_keeps_its_scale(tmp_path):
    X = np.stack([np.full(40, 1000.0), np.arange(40.0)], axis=1)
    made = make_store(tmp_path / "s", {"penultimate": X}, {"label": cycle("ab", 40)}, [""] * 40)
    data = plan(made)
    parts = Parts(data.codes, np.zeros(40, np.int8), 1, 2)

    fit = streamed(data, parts, "prototype", [{}])

    assert fit.scaler([0]).scale[0] == 1


@pytest.mark.parametrize("kind", ["standardise", "l2", "none"])
@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 3.0, 2: 0.5}])
def test_ridge_is_the_one_in_memory(data, parts, kind, class_weight):
    settings = [{"alpha": alpha, "class_weight": class_weight} for alpha in (0.1, 10.0, 1e3)]
    fit = streamed(data, parts, "ridge", settings, kind=kind)
    scaler = fit.scaler([0, 1, 2, 3, 4])
    X = scaler(data.inputs.X)

    found = fit.fit(range(3), [0, 1, 4], scaler)

    assert len(found) == 9
    assert fit.rows.n_passes == 1
    for one in found:
        rows = parts.numbers != one.left_out if one.left_out else slice(None)
        held = make_head("ridge", **settings[one.setting]).fit(
            X[rows].astype(np.float64), data.codes[rows]
        )
        np.testing.assert_allclose(one.head.coef_, held.coef_, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(one.head.intercept_, held.intercept_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("standardise", np.float64), ("l2", np.float32), ("none", np.float64), ("standardise", None)],
)
def test_logistic_reaches_the_optimum(data, parts, kind, dtype):
    settings = [{"C": C} for C in (1e-3, 0.1, 10.0)]
    fit = streamed(data, parts, "logreg", settings, kind=kind, dtype=dtype, block_rows=200)
    scaler = fit.scaler([0])
    X = scaler(data.inputs.X).astype(np.float64)

    for one in fit.fit(range(3), [0, 2], scaler):
        rows = parts.numbers != one.left_out if one.left_out else slice(None)
        C = settings[one.setting]["C"]
        best = make_head("logreg", C=C, tol=1e-9).fit(X[rows], data.codes[rows])
        gap = objective(one.head, X[rows], data.codes[rows]) / objective(
            best, X[rows], data.codes[rows]
        )
        assert gap - 1 < 1e-4
        assert one.head.converged_


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("name", ["logreg", "svm"])
def test_linear_heads_agree_with_those_in_memory(data, parts, name, n_classes):
    codes = data.codes % n_classes
    parts = Parts(codes, parts.numbers, 5, n_classes)
    setting = {"C": 0.05, "class_weight": "balanced", "tol": 1e-7}
    if name == "svm":
        setting["kernel"] = "linear"
    fit = streamed(data, parts, name, [setting], block_rows=200)
    scaler = fit.scaler([0, 1, 2, 3, 4])
    X = scaler(data.inputs.X)
    rows = parts.numbers != 3

    (found,) = fit.fit([0], [3], scaler)

    held = make_head(name, **setting).fit(X[rows].astype(np.float64), codes[rows])
    np.testing.assert_allclose(found.head.logits(X), held.logits(X), atol=5e-3)
    restored = type(held).from_arrays(setting, found.head.to_arrays())
    np.testing.assert_array_equal(restored.predict(X), found.head.predict(X))


def test_start_does_not_move_the_optimum_and_saves_passes(data, parts):
    fit = streamed(data, parts, "logreg", [{"C": 1.0, "tol": 1e-8}], block_rows=400)
    scaler, other = fit.scaler([0, 1, 2, 3, 4]), fit.scaler([0])
    (cold,) = fit.fit([0], [0], scaler)
    n_cold = fit.rows.n_passes
    X = data.inputs.X

    (warm,) = fit.fit([0], [0], other, (cold.head, scaler))

    assert fit.rows.n_passes - n_cold < n_cold
    scores = warm.head.logits(other(X)) - cold.head.logits(scaler(X))
    assert np.abs(scores).max() < 0.3  # the scaling differs, and with it the penalty


@pytest.mark.parametrize("normalise", ["cl2n", "l2n", "none"])
@pytest.mark.parametrize("kind", ["standardise", "none"])
def test_prototypes_are_those_in_memory(data, parts, normalise, kind):
    fit = streamed(data, parts, "prototype", [{"normalise": normalise}], kind=kind)
    scaler = fit.scaler([0, 1, 2, 3, 4])
    X = scaler(data.inputs.X)

    for one in fit.fit([0], [0, 1], scaler):
        rows = parts.numbers != one.left_out if one.left_out else slice(None)
        held = make_head("prototype", normalise=normalise).fit(X[rows], data.codes[rows])
        np.testing.assert_allclose(one.head.mean_, held.mean_, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one.head.prototypes_, held.prototypes_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("ridge", {}),
        ("logreg", {}),
        ("prototype", {"normalise": "none"}),
        ("linear", {"epochs": 3}),
        ("knn", {}),
    ],
)
def test_fit_without_some_class_knows_the_others(data, parts, name, setting):
    codes = data.codes.copy()
    codes[(codes == 2) & (parts.numbers != 1)] = 0
    parts = Parts(codes, parts.numbers, 5, 4)
    fit = streamed(data, parts, name, [setting], block_rows=200)
    scaler = fit.scaler([0, 1, 2, 3, 4])
    X = scaler(data.inputs.X)
    rows = parts.numbers != 1

    without, everything = fit.fit([0], [1, 0], scaler)

    assert without.head.classes_.tolist() == [0, 1, 3]
    assert everything.head.classes_.tolist() == [0, 1, 2, 3]
    held = make_head(name, **setting).fit(X[rows], codes[rows])
    np.testing.assert_allclose(without.head.logits(X), held.logits(X), atol=0.05)


GRADIENT = [
    {"lr": lr, "epochs": 3, "batch_size": 32, "optimizer": optimizer, "warmup": 0.1}
    for lr in (0.003, 0.03)
    for optimizer in ("adamw", "sgd")
]


@pytest.mark.parametrize(
    ("kind", "class_weight", "n_problems"),
    [("standardise", None, 8), ("l2", "balanced", 8), ("none", {0: 3.0, 2: 0.5}, 1)],
)
def test_softmax_on_one_block_is_the_one_in_memory(data, parts, kind, class_weight, n_problems):
    extra = {"class_weight": class_weight, "label_smoothing": 0.1, "seed": 3}
    settings = [setting | extra for setting in GRADIENT]
    fit = streamed(data, parts, "linear", settings, kind=kind, n_problems=n_problems)
    scaler = fit.scaler([0, 1, 2, 3, 4])
    X = scaler(data.inputs.X)
    rows = parts.numbers != 2

    found = fit.fit(range(4), [2], scaler)

    assert len(found) == 4
    for one in found:
        held = make_head("linear", **settings[one.setting]).fit(X[rows], data.codes[rows])
        # AdamW's first steps follow the sign of a gradient, even where it is rounding alone.
        atol = 1e-5 if held.optimizer == "sgd" else 0.1 * held.lr
        np.testing.assert_allclose(one.head.weight_, held.weight_, rtol=1e-3, atol=atol)
        np.testing.assert_allclose(one.head.bias_, held.bias_, rtol=1e-3, atol=atol)
        assert one.head.n_iter_ == held.n_iter_


def test_softmax_on_blocks_scores_as_in_memory_though_files_are_sorted(data):
    by_class = np.argsort(np.argsort(data.codes, kind="stable"))
    parts = Parts(data.codes, np.zeros(N, np.int8), 1, 4)
    setting = {"lr": 0.02, "epochs": 10, "batch_size": 16}
    fit = streamed(data, parts, "linear", [setting], held_rows=128)
    fit.rows._order, fit.rows._positions = np.argsort(by_class), np.arange(N)
    scaler = fit.scaler([0])
    X = scaler(data.inputs.X)

    (found,) = fit.fit([0], [0], scaler)

    held = make_head("linear", **setting).fit(X, data.codes)
    ours, theirs = (evaluate(data.codes, head.predict_proba(X)) for head in (found.head, held))
    assert fit.rows.n_passes == 1 + 10
    assert ours["nll"].value == pytest.approx(theirs["nll"].value, rel=0.02)
    assert ours["top1"].value == pytest.approx(theirs["top1"].value, abs=0.01)


def test_learning_rate_that_is_too_large_fails_alone(data, parts):
    settings = [{"lr": lr, "epochs": 2} for lr in (1e-3, 1e38)]
    fit = streamed(data, parts, "linear", settings)

    good, bad = fit.fit([0, 1], [0], fit.scaler([0]))

    assert np.isfinite(good.head.weight_).all()
    assert "ArithmeticError: its parameters are not finite: try a learning rate below 1e+38" in (
        bad.failure
    )


@pytest.mark.parametrize("kind", ["standardise", "l2", "none"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("block_rows", [25, 200])
def test_neighbours_are_those_in_memory(data, parts, kind, metric, block_rows):
    settings = [{"k": k, "metric": metric, "temperature": 0.3} for k in (9, 1000)]
    fit = streamed(data, parts, "knn", settings, kind=kind, block_rows=block_rows)
    scaler = fit.scaler([0, 1, 2, 3, 4])
    X = scaler(data.inputs.X)
    rows = parts.numbers != 4

    for one in fit.fit(range(2), [4], scaler):
        held = make_head("knn", **settings[one.setting]).fit(X[rows], data.codes[rows])
        assert one.head.k_ == held.k_
        assert one.head.variance_ == pytest.approx(held.variance_, rel=1e-5)
        ours, theirs = (head.neighbours([head], X)[metric].index for head in (one.head, held))
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_allclose(one.head.logits(X), held.logits(X), atol=1e-3)


def test_settings_of_neighbours_share_a_search(data, parts):
    settings = [{"k": k, "metric": metric} for k in (1, 9) for metric in ("cosine", "euclidean")]
    fit = streamed(data, parts, "knn", settings, block_rows=50)
    scaler = fit.scaler([0, 1, 2, 3, 4])
    heads = {one.setting: one.head for one in fit.fit(range(4), [1], scaler)}
    X = scaler(data.inputs.X[:120])
    before = fit.rows.n_passes

    blocks = list(fit.logits(heads, X))

    assert fit.rows.n_passes - before <= 3  # all, those to measure again, those to search again
    assert [len(tables[0]) for _, tables in blocks] == [50, 50, 20]
    for i, head in heads.items():
        together = np.concatenate([tables[i] for _, tables in blocks])
        np.testing.assert_allclose(together, head.logits(X), atol=1e-4)


def test_bad_setting_fails_alone(data, parts):
    fit = streamed(data, parts, "ridge", [{"alpha": 1.0}, {"alpha": -1.0}])

    found = fit.fit([0, 1], [0], fit.scaler([0]))

    failures = {one.setting: one.failure for one in found}
    assert failures == {0: "", 1: "ValueError: alpha is -1.0, expected a number above 0"}


def test_solver_that_stops_early_says_so(data, parts):
    fit = streamed(data, parts, "logreg", [{"C": 1e4, "max_iter": 1}])

    (found,) = fit.fit([0], [0], fit.scaler([0]))

    assert not found.head.converged_
    assert found.head.n_iter_ == 1


def test_outcomes_score_as_all_probabilities_do():
    rng = np.random.default_rng(0)
    rows = rng.permutation(50)[:30]
    codes = rng.integers(0, 3, 50)
    probabilities = rng.dirichlet(np.ones(3), 50)
    outcomes = Outcomes(rows, codes, 4)

    for block in np.array_split(np.sort(rows), 4):
        outcomes.add(block, probabilities[block])

    padded = np.pad(probabilities, ((0, 0), (0, 1)))
    assert outcomes.scores(seed=3) == evaluate(codes[rows], padded[rows], seed=3)
    np.testing.assert_array_equal(outcomes.predicted, probabilities[rows].argmax(axis=1))
    assert outcomes.confusion().sum() == 30


def test_what_streams():
    assert can_stream("svm", {"kernel": "linear"})
    assert not can_stream("svm", {})
    assert not can_stream("svm", {"kernel": "linear", "loss": "hinge"})
    assert not can_stream("logreg", {"penalty": "l1"})
    assert can_stream("knn", {"k": 3})
    assert can_stream("linear", {"lr": 0.1})
    assert not can_stream("mlp", {})


@pytest.mark.parametrize("name", ["ridge", "logreg", "prototype", "linear", "knn"])
def test_memory_plan_stays_within_its_room_and_says_what_it_needs(name):
    tight = MemoryPlan.of(name, 2048, 100, 2, 6, 4e8, 100)
    ample = MemoryPlan.of(name, 2048, 100, 2, 6, 4e10, 100)

    assert tight.needed_bytes == ample.needed_bytes < 4e8
    assert tight.block_rows <= ample.block_rows
    assert tight.n_problems <= ample.n_problems
    assert tight.held_rows <= ample.held_rows
    assert 8 * (tight.block_rows + tight.held_rows) * 2048 < 4e8


SIZE = FitSize(
    n_samples=5000, n_fitted=4000, n_chosen=800, n_test=1000, n_features=64, n_classes=10,
    n_folds=1, n_fold=3200, n_pair=800,
)  # fmt: skip
FEATURES = 4.0 * (5000 + 4000) * 64  # all of them, and those that are fitted on once more, scaled


@pytest.mark.parametrize("name", sorted(HEADS))
def test_fit_in_memory_takes_more_than_its_features_and_grows_with_them(name):
    once = held_bytes(name, [{}], SIZE)
    twice = held_bytes(name, [{}], replace(SIZE, n_samples=10_000, n_fitted=8000, n_chosen=1600))

    assert FEATURES < once < twice


@pytest.mark.parametrize(
    ("name", "setting", "least"),
    [
        ("ridge", {}, 12.0 * 4000 * 64),  # the rows of the fold and their design in float64
        ("logreg", {}, 10.0 * 4000 * 64),  # float32, and the design's half in bfloat16
        ("logreg", {"penalty": "l1"}, 12.0 * 4000 * 64),
        ("knn", {}, 20.0 * 4000 * 64),  # kept, and their distances to the mean
        ("mlp", {"hidden": 1024}, 16.0 * 64 * 1024),
        ("svm", {}, 16.0 * 4000**2),  # distances, their exponentials, and these in float64
        ("svm", {"max_exact_rows": 1000}, 12.0 * 4000 * 2048),
        ("svm", {"kernel": "linear", "loss": "hinge"}, 24.0 * 4000 * 64),
    ],
)
def test_arrays_of_a_solver_are_counted(name, setting, least):
    assert held_bytes(name, [setting], SIZE) >= FEATURES + least


def test_settings_that_share_a_kernel_take_one():
    one, wide = {"C": 1.0}, {"C": 1.0, "gamma": 0.1}
    kernel = 8.0 * 4000**2

    alone = held_bytes("svm", [one], SIZE)

    assert held_bytes("svm", [one, {"C": 10.0}], SIZE) < alone + 0.5 * kernel
    assert held_bytes("svm", [one, wide], SIZE) > alone + kernel


def test_views_are_held_as_often_as_they_are_read_and_scaled():
    several = held_bytes("mlp", [{}], replace(SIZE, n_views=8)) - held_bytes("mlp", [{}], SIZE)

    assert several == 4.0 * 64 * (8 * 5000 + 2 * 7 * 4000)


def test_refused_setting_takes_nothing():
    assert held_bytes("svm", [{"C": -1.0}], SIZE) < held_bytes("svm", [{"C": 1.0}], SIZE)
