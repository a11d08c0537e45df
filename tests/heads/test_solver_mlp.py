"""Networks trained side by side are what each would be alone, and what a plain loop makes."""

import math

import numpy as np
import pytest
import torch
from sklearn.neural_network import MLPClassifier
from torch.nn.functional import cross_entropy

from pipeline.heads.solvers.mlp import MlpSetting, Training, fit_mlps, mlp_logits

QUICK = Training(n_epochs=4, batch_size=32, precision="float32")


def blobs(n_samples=120, n_features=12, n_classes=3, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, n_classes, n_samples)
    centres = 2 * np.random.default_rng(9).normal(size=(n_classes, n_features))
    X = centres[y] + rng.normal(size=(n_samples, n_features))
    return X.astype(np.float32), y


def same(one, other):
    pairs = zip(one.weights + one.biases, other.weights + other.biases, strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def plain_loop(X, y, setting, training, start, sample_weight=None):
    """One network by autograd and torch.optim, with the batches that the solver documents."""
    params = [torch.tensor(p).requires_grad_() for p in start]
    matrices, vectors = [p for p in params if p.ndim == 2], [p for p in params if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": setting.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]  # fmt: skip
    optimizer = (
        torch.optim.AdamW(groups, lr=setting.lr)
        if training.optimizer == "adamw"
        else torch.optim.SGD(groups, lr=setting.lr, momentum=0.9)
    )
    x, y = torch.tensor(X), torch.tensor(y)
    weights = torch.ones(len(x)) if sample_weight is None else torch.tensor(sample_weight).float()
    weights = weights / weights.mean()
    generator = torch.Generator().manual_seed(training.seed)
    n_steps = math.ceil(len(x) / training.batch_size) * training.n_epochs
    step = 0
    for _ in range(training.n_epochs):
        for rows in torch.randperm(len(x), generator=generator).split(training.batch_size):
            z = x[rows]
            for i, (weight, bias) in enumerate(zip(matrices, vectors, strict=True)):
                z = z @ weight.T + bias
                z = torch.relu(z) if i < len(matrices) - 1 else z
            losses = cross_entropy(
                z, y[rows], reduction="none", label_smoothing=setting.label_smoothing
            )
            optimizer.zero_grad()
            (losses * weights[rows]).mean().backward()
            for group in optimizer.param_groups:
                group["lr"] = setting.lr * training.lr_factor(step, n_steps)
            optimizer.step()
            step += 1
    return [p.detach().numpy() for p in params]


def start_of(X, setting, n_classes):
    """Parameters before the first step: those of a step of all but no length."""
    still = MlpSetting(**{**vars(setting), "lr": 1e-30})
    (model,) = fit_mlps(
        X, np.arange(len(X)) % n_classes, [still], n_classes=n_classes,
        training=Training(n_epochs=1, batch_size=len(X), precision="float32"),
    )  # fmt: skip
    return [p for pair in zip(model.weights, model.biases, strict=True) for p in pair]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("hidden", [(), (8,), (8, 6)])
def test_a_member_learns_what_a_plain_loop_learns(hidden, optimizer):
    X, y = blobs()
    setting = MlpSetting(hidden, lr=0.02, weight_decay=0.1, label_smoothing=0.1, seed=3)
    training = Training(
        n_epochs=4, batch_size=32, warmup=0.2, precision="float32", optimizer=optimizer
    )
    weight = np.random.default_rng(1).random(len(X))

    (model,) = fit_mlps(X, y, [setting], n_classes=3, training=training, sample_weight=weight)

    expected = plain_loop(X, y, setting, training, start_of(X, setting, 3), weight)
    for ours, theirs in zip(model.weights, expected[::2], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
    for ours, theirs in zip(model.biases, expected[1::2], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_companions_do_not_matter(precision):
    X, y = blobs()
    training = Training(n_epochs=3, batch_size=32, precision=precision)
    members = [
        MlpSetting((16,), dropout=0.3, seed=1),
        MlpSetting((16,), lr=0.1, seed=2),
        MlpSetting((16, 16), weight_decay=1.0),
        MlpSetting((16,), dropout=0.5, label_smoothing=0.2, seed=4),
        MlpSetting((32,), dropout=0.1),
    ]

    together = fit_mlps(X, y, members, n_classes=3, training=training)

    for setting, model in zip(members, together, strict=True):
        (alone,) = fit_mlps(X, y, [setting], n_classes=3, training=training)
        # One product or several may add up in another order: rounding, not another network.
        for a, b in zip(alone.weights, model.weights, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    assert all(map(same, together, fit_mlps(X, y, members, n_classes=3, training=training)))
    assert all(
        map(same, together[::-1], fit_mlps(X, y, members[::-1], n_classes=3, training=training))
    )


def test_a_fold_is_a_pair_of_weights():
    X, y = blobs()
    seen = np.arange(len(X)) % 3 > 0
    training = Training(n_epochs=6, batch_size=len(X), precision="float32")
    members = [MlpSetting((8,), lr=0.01)] * 2

    _, fold = fit_mlps(
        X, y, members, n_classes=3, training=training, X_val=X, y_val=y,
        sample_weight=np.stack([np.ones(len(X)), seen]),
        val_weight=np.stack([np.ones(len(X)), ~seen]),
    )  # fmt: skip
    (copied,) = fit_mlps(
        X[seen], y[seen], members[:1], n_classes=3, training=training,
        X_val=X[~seen], y_val=y[~seen],
    )  # fmt: skip

    assert fold.val_loss == pytest.approx(copied.val_loss, rel=1e-3)
    np.testing.assert_allclose(fold.weights[0], copied.weights[0], atol=1e-3)


@pytest.mark.parametrize("hidden", [(), (8,)])
def test_rows_are_as_if_there_were_no_others(hidden):
    X, y = blobs()
    rows, val_rows = np.arange(90)[::-1], np.arange(90, 120)
    weight = np.random.default_rng(1).random(len(X))
    members = [MlpSetting(hidden, lr=0.01)]

    (chosen,) = fit_mlps(
        X, y, members, n_classes=3, training=QUICK, rows=rows, sample_weight=weight,
        X_val=X, y_val=y, val_rows=val_rows, val_weight=weight,
    )  # fmt: skip
    (copied,) = fit_mlps(
        X[rows], y[rows], members, n_classes=3, training=QUICK, sample_weight=weight[rows],
        X_val=X[val_rows], y_val=y[val_rows], val_weight=weight[val_rows],
    )  # fmt: skip

    assert same(chosen, copied)
    assert chosen.val_loss == copied.val_loss


def test_members_stop_on_their_own_and_keep_their_best():
    X, y = blobs(60)
    X_val, y_val = blobs(60, seed=1)
    members = [MlpSetting((16,), lr=lr, seed=i) for i, lr in enumerate([0.3, 1e-4, 0.01])]
    training = Training(n_epochs=30, batch_size=16, patience=2, precision="float32")

    models = fit_mlps(X, y, members, n_classes=3, training=training, X_val=X_val, y_val=y_val)

    epochs = [model.n_epochs for model in models]
    assert len(set(epochs)) > 1
    assert min(epochs) < training.n_epochs
    for model, scores in zip(models, mlp_logits(models, X_val), strict=True):
        loss = cross_entropy(torch.tensor(scores), torch.tensor(y_val))
        assert float(loss) == pytest.approx(model.val_loss, rel=1e-4, abs=1e-6)
        assert model.n_epochs - model.best_epoch in {0, 1, 2}


def test_a_member_that_blows_up_takes_no_other_with_it():
    X, y = blobs()
    members = [MlpSetting((8,), lr=1e-2), MlpSetting((8,), lr=1e38)]

    good, bad = fit_mlps(X, y, members, n_classes=3, training=QUICK)

    (alone,) = fit_mlps(X, y, members[:1], n_classes=3, training=QUICK)
    assert "not finite in epoch 1: try a learning rate below 1e+38" in bad.failure
    assert bad.n_epochs == 1
    assert not good.failure
    np.testing.assert_allclose(good.weights[0], alone.weights[0], atol=1e-5)


def test_training_learns_as_well_as_scikit_learn():
    X, y = blobs(300)
    X_test, y_test = blobs(300, seed=5)
    members = [MlpSetting((16,), lr=0.01, seed=seed) for seed in range(6)]
    training = Training(n_epochs=15, batch_size=32)

    scores = mlp_logits(fit_mlps(X, y, members, n_classes=3, training=training), X_test)

    theirs = MLPClassifier((16,), learning_rate_init=0.01, batch_size=32, max_iter=15,
                           tol=0, n_iter_no_change=99, random_state=0)  # fmt: skip
    with pytest.warns(match="Maximum iterations"):
        theirs.fit(X, y)
    accuracies = (scores.argmax(axis=2) == y_test).mean(axis=1)
    assert accuracies.mean() > theirs.score(X_test, y_test) - 0.02


def test_views_are_drawn_by_the_seed():
    X, y = blobs()
    views = np.stack([X, X + 0.5], axis=1)
    setting = [MlpSetting((8,), lr=0.01)]

    def train(data, seed):
        training = Training(n_epochs=2, precision="float32", seed=seed)
        return fit_mlps(data, y, setting, n_classes=3, training=training)[0]

    assert same(train(views, 0), train(views, 0))
    assert not same(train(views, 0), train(views, 1))
    assert not same(train(views, 0), train(views[:, :1], 0))


# Degenerate input


def test_constant_features_one_class_and_one_sample_are_fitted():
    X = np.full((1, 3), 2.0, np.float32)

    models = fit_mlps(
        X, np.zeros(1, int), [MlpSetting((4,)), MlpSetting(())], n_classes=2, training=QUICK
    )

    assert np.isfinite(mlp_logits(models, X)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": np.full((5, 2), np.nan, np.float32)}, r"5 of 5 rows of X hold NaN .*row 0\)"),
        ({"y": np.array([0, 1, 2, 0, 9])}, "from 0 to 9, expected class indices from 0 to 2"),
        ({"y": np.zeros(4, int)}, r"its labels \(4,\), expected"),
        ({"sample_weight": np.zeros(5)}, "all zero for member 0: it has no sample left"),
        ({"sample_weight": -np.ones(5)}, "none negative or NaN"),
        ({"rows": np.zeros(0, int)}, "No rows of X were chosen, expected at least 1"),
        ({"X": np.ones((5, 0), np.float32)}, r"X has shape \(5, 0\)"),
        ({"X_val": np.ones((2, 3)), "y_val": np.zeros(2, int)}, "3 features, expected 2"),
    ],
)
def test_data_that_does_not_fit_is_refused(change, message):
    given = {"X": np.ones((5, 2), np.float32), "y": np.arange(5) % 3} | change

    with pytest.raises(ValueError, match=message):
        fit_mlps(members=[MlpSetting((4,))], n_classes=3, training=QUICK, **given)


def test_settings_that_do_not_fit_are_refused():
    X, y = blobs()

    with pytest.raises(ValueError, match="dropout is 1"):
        MlpSetting(dropout=1.0)
    with pytest.raises(ValueError, match="1 or more each"):
        MlpSetting((0,))
    with pytest.raises(ValueError, match="lr is nan"):
        MlpSetting(lr=math.nan)
    with pytest.raises(ValueError, match="0 epochs in batches of 256"):
        Training(n_epochs=0)
    with pytest.raises(ValueError, match="patience is 0, expected 1 or more"):
        Training(patience=0)
    with pytest.raises(ValueError, match="optimizer is 'lion', expected one of adamw, sgd"):
        Training(optimizer="lion")
    with pytest.raises(ValueError, match="needs X_val and y_val"):
        fit_mlps(X, y, [MlpSetting()], n_classes=3, training=Training(patience=2))
