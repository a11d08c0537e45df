"""Several label columns at once: the loss is the one that is documented, labels may be missing."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch.nn.functional import cross_entropy

from pipeline.errors import CorruptStoreError, UnknownNameError
from pipeline.heads import multitask_class
from pipeline.heads.folds import Fold
from pipeline.heads.model import HeadModel
from pipeline.heads.multitask import MultiTaskMLP
from pipeline.heads.scaling import fit_scaler
from pipeline.heads.solvers.mlp import MlpSetting, Training, fit_mlps
from pipeline.heads.solvers.mlp_loss import Objective, mean_over_tasks
from pipeline.heads.tasks import NO_LABEL, Task, encode_labels, strata, task_slices

QUICK = {"hidden": 32, "epochs": 20, "lr": 3e-3, "batch_size": 32}
SIZES = [3, 2]


def made(n=240, missing=0.5, seed=0):
    """Points of three clouds and of two halves of another plane; half of the second unlabelled."""
    rng = np.random.default_rng(seed)
    kind, side = rng.integers(0, 3, n), rng.integers(0, 2, n)
    X = rng.normal(scale=0.4, size=(n, 6))
    X[np.arange(n), kind] += 2
    X[:, 4] += 2 * side - 1
    Y = np.stack([kind, np.where(rng.random(n) < missing, NO_LABEL, side)], axis=1)
    return X.astype(np.float32), Y, np.stack([kind, side], axis=1)


# The loss


def objective(n_members=2, smoothing=0.1):
    settings = [MlpSetting(label_smoothing=smoothing)] * n_members
    return Objective.of(task_slices(SIZES), settings, torch.device("cpu"))


@pytest.mark.parametrize("uncertain", [False, True])
def test_the_gradient_is_that_of_the_documented_loss(uncertain):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 9, 5, generator=generator).requires_grad_()
    s = torch.randn(2, 2, generator=generator).requires_grad_()
    y = torch.tensor([[0, 1], [1, -1], [2, 0], [-1, 1], [0, -1], [1, -1], [2, 1], [0, 0], [-1, 0]])
    loss = torch.zeros(())
    for member in range(2):
        for t, part in enumerate(task_slices(SIZES)):
            mean = cross_entropy(
                scores[member, :, part], y[:, t], ignore_index=NO_LABEL, label_smoothing=0.1
            )
            loss = loss + (
                torch.exp(-s[member, t]) * mean + s[member, t] / 2 if uncertain else mean / 2
            )
    loss.backward()

    into = [torch.full((2, 2), torch.nan)]
    found = objective().gradient(
        scores.detach(), y, torch.ones(1, 9), [s.detach()] if uncertain else [], into
    )

    torch.testing.assert_close(found, scores.grad)
    if uncertain:
        torch.testing.assert_close(into[0], s.grad)


def test_a_batch_without_labels_of_a_task_moves_nothing_of_it():
    y = torch.tensor([[0, -1], [1, -1]])
    into = [torch.ones(2, 2)]

    found = objective().gradient(torch.ones(2, 2, 5), y, torch.ones(1, 2), [torch.ones(2, 2)], into)

    assert (found[:, :, 3:] == 0).all()
    assert found[:, :, :3].abs().max() > 0
    assert (into[0][:, 1] == 0).all()


def test_validation_is_the_mean_over_the_tasks_that_have_labels():
    scores = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[0, -1], [1, -1], [-1, 1], [2, -1]])
    expected = [
        (cross_entropy(one[:, :3], y[:, 0], ignore_index=-1)
         + cross_entropy(one[:, 3:], y[:, 1], ignore_index=-1)) / 2
        for one in scores
    ]  # fmt: skip

    halves = [
        objective().validation(scores[:, rows], y[rows], torch.ones(1, 2))
        for rows in (slice(0, 2), slice(2, 4))
    ]
    found = mean_over_tasks(halves[0][0] + halves[1][0], halves[0][1] + halves[1][1])
    first_alone = mean_over_tasks(*halves[0])

    torch.testing.assert_close(found.float(), torch.stack(expected))
    torch.testing.assert_close(
        first_alone.float(),
        torch.stack([cross_entropy(one[:2, :3], y[:2, 0]) for one in scores]),
    )


def test_one_task_in_a_table_is_one_task():
    X, _, Y = made()
    members, training = [MlpSetting((8,), dropout=0.1)], Training(n_epochs=2, precision="float32")

    (alone,) = fit_mlps(X, Y[:, 0], members, n_classes=3, training=training)
    (table,) = fit_mlps(X, Y[:, :1], members, n_classes=[3], training=training)

    for a, b in zip(alone.weights, table.weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# The head


def test_both_tasks_are_learned_and_missing_labels_do_no_harm():
    X, Y, truth = made(300)

    head = MultiTaskMLP(SIZES, **QUICK).fit(X[:240], Y[:240])

    right = (head.predict(X[240:]) == truth[240:]).mean(axis=0)
    assert (right > 0.9).all()
    assert head.score(X[240:], truth[240:]) == pytest.approx(right.mean())
    proba = head.predict_proba(X[240:])
    assert proba.shape == (60, 5)
    for part in task_slices(SIZES):
        np.testing.assert_allclose(proba[:, part].sum(axis=1), 1)


def test_uncertainty_trusts_the_task_that_can_be_learned():
    X, _, truth = made(400)
    rng = np.random.default_rng(0)
    Y = np.stack([truth[:, 0], rng.integers(0, 2, 400)], axis=1)  # the second is noise

    head = MultiTaskMLP(
        SIZES, **QUICK | {"epochs": 40, "lr": 1e-2}, task_weights="uncertainty"
    ).fit(X, Y)

    easy, noise = head.log_variances_
    assert easy < noise
    assert MultiTaskMLP(SIZES, **QUICK).fit(X, Y).log_variances_ == ()


def test_settings_together_learn_what_each_learns_alone():
    X, Y, _ = made()
    settings = [
        {"n_classes": SIZES, "task_weights": weights, **QUICK, "hidden": hidden}
        for weights in ("equal", "uncertainty")
        for hidden in (8, 16)
    ]
    fold = Fold(np.arange(0, 200), np.arange(200, 240))

    results = {r.setting: r for r in MultiTaskMLP.try_settings(settings, X, Y, [fold], n_classes=5)}

    for i, setting in enumerate(settings):
        alone = MultiTaskMLP(**setting).fit(X[fold.fit], Y[fold.fit]).logits(X[fold.choose])
        np.testing.assert_allclose(results[i].logits, alone, atol=0.02)


def test_a_class_that_a_fold_lacks_keeps_its_output():
    X, Y, _ = made()
    fit = np.flatnonzero(Y[:, 0] != 2)

    (result,) = MultiTaskMLP.try_settings(
        [{"n_classes": SIZES, **QUICK}], X, Y, [Fold(fit, np.arange(5))], n_classes=5
    )

    assert result.failure == ""
    assert np.isfinite(result.logits).all()


def test_early_stopping_looks_at_all_tasks():
    X, Y, truth = made(400)

    head = MultiTaskMLP(SIZES, **QUICK | {"epochs": 200}, early_stopping=True, patience=3)
    head.fit(X, Y)

    assert head.n_iter_ < 200
    assert (head.predict(X) == truth).mean() > 0.9


def test_it_can_be_cloned_and_is_deterministic():
    X, Y, _ = made()
    head = MultiTaskMLP(SIZES, **QUICK, seed=3)

    a, b = head.fit(X, Y), clone(head).fit(X, Y)

    np.testing.assert_array_equal(a.weight_, b.weight_)
    assert clone(head).get_params() == head.get_params()
    assert "class_weight" not in head.get_params()


@pytest.mark.parametrize(
    ("sizes", "codes", "message"),
    [
        ([], [[0, 1]], "n_classes is empty"),
        ([3, 1], [[0, 1]], "expected 2 or more for each task"),
        ([3, 2.0], [[0, 1]], "expected 2 or more for each task"),
        ([3, 2, 2], [[0, 1]], r"expected class codes of shape \(n_samples, 3\)"),
        ([3, 2], [[0.5, 1.0]], "y is float64"),
        ([3, 2], [[3, 1]], "expected class indices from -1 to 2"),
        ([3, 2], [[0, -2]], "expected class indices from -1 to 1"),
        ([3, 2], [[-1, -1]], "y has no label in any column"),
    ],
)
def test_what_does_not_fit_is_refused(sizes, codes, message):
    X = np.zeros((4, 3))

    with pytest.raises(ValueError, match=message):
        MultiTaskMLP(sizes).fit(X, np.repeat(codes, 4, axis=0))


def test_a_column_without_labels_is_not_scored():
    X, Y, truth = made()
    head = MultiTaskMLP([np.int64(3), 2], **QUICK).fit(X, Y)
    Y[:, 1] = NO_LABEL

    assert head.score(X, Y) == np.mean(head.predict(X)[:, 0] == truth[:, 0])
    Y[:, 0] = NO_LABEL
    with pytest.raises(ValueError, match="no label with a weight in any column"):
        head.score(X, Y)


def test_an_unknown_weighting_is_refused():
    X, Y, _ = made(20)

    with pytest.raises(ValueError, match="task_weights is 'loud', expected one of equal, uncert"):
        MultiTaskMLP(SIZES, task_weights="loud").fit(X, Y)


def test_only_an_mlp_learns_several_columns():
    with pytest.raises(UnknownNameError, match="Unknown head for several label columns 'knn'"):
        multitask_class("knn")


# The model around it


def model_of(**params):
    X, Y, _ = made()
    tasks = (Task("kind", ("a", "b", "c")), Task("side", ("left", "right")))
    scaler = fit_scaler(X, "standardise")
    head = MultiTaskMLP(SIZES, **QUICK, **params).fit(scaler(X), Y)
    return X, HeadModel(scaler, head, 1.0, ("a", "b", "c", "left", "right"), tasks)


def rebuilt(model, tasks=None, **params):
    return HeadModel.from_arrays(
        model.to_arrays(), head="mlp", params=model.head.get_params() | params,
        scaling="standardise", widths=[6], temperature=1.0, classes=model.classes,
        tasks=model.tasks if tasks is None else tasks,
    )  # fmt: skip


def test_a_model_comes_back_from_its_arrays():
    X, model = model_of(task_weights="uncertainty")

    again = rebuilt(model)

    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    np.testing.assert_allclose(again.predict_proba(X)[:, :3].sum(axis=1), 1)
    with pytest.raises(ValueError, match="several label columns"):
        model.predict(X)


def test_a_model_whose_parts_do_not_fit_is_refused():
    _, model = model_of()

    with pytest.raises(CorruptStoreError, match=r"in parts of \[2, 3\], but \[3, 2\] classes"):
        rebuilt(model, n_classes=[2, 3])
    with pytest.raises(CorruptStoreError, match=r"but \[2, 3\] classes are named"):
        rebuilt(model, (Task("side", ("l", "r")), Task("kind", ("a", "b", "c"))))
    with pytest.raises(CorruptStoreError, match="has 5 outputs in parts of"):
        rebuilt(model, (Task("a", ("x", "y")), Task("b", ("x", "y"))), n_classes=[2, 2])


# Columns


def test_samples_are_stratified_by_the_first_label_that_they_have():
    columns = {
        "a": np.array(["x", None, None, "y"], dtype=object),
        "b": np.array(["p", "q", None, None], dtype=object),
    }

    assert strata(columns).tolist() == ["x", "b=q", None, "y"]
    assert columns["a"].tolist() == ["x", None, None, "y"]


def test_codes_are_of_learned_classes_then_of_those_only_test_has():
    labels = np.array(["b", None, "a", "z", "a", None], dtype=object)

    codes, known, unseen = encode_labels(labels, np.array([0, 1, 2]), np.array([3, 4, 5]))

    assert codes.tolist() == [1, NO_LABEL, 0, 2, 0, NO_LABEL]
    assert (known, unseen) == (("a", "b"), ("z",))
