"""Scores agree with scikit-learn, and their intervals hold them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    top_k_accuracy_score,
)
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

from pipeline.heads.base import softmax
from pipeline.heads.calibration import fit_temperature
from pipeline.heads.metrics import Score, confusion_matrix, evaluate, rank_of_truth


def make_predictions(n_samples, n_classes, seed=0, skill=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n_samples)
    logits = rng.normal(size=(n_samples, n_classes))
    logits[np.arange(n_samples), labels] += skill
    return labels, softmax(logits)


def test_scores_agree_with_scikit_learn():
    labels, probabilities = make_predictions(500, 12)
    predicted = probabilities.argmax(axis=1)

    scores = evaluate(labels, probabilities)

    every = np.arange(12)
    assert scores["top1"].value == pytest.approx(accuracy_score(labels, predicted))
    assert scores["top5"].value == pytest.approx(
        top_k_accuracy_score(labels, probabilities, k=5, labels=every)
    )
    assert scores["macro_f1"].value == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert scores["mean_per_class_accuracy"].value == pytest.approx(
        balanced_accuracy_score(labels, predicted)
    )
    assert scores["nll"].value == pytest.approx(log_loss(labels, probabilities, labels=every))
    np.testing.assert_array_equal(
        confusion_matrix(labels, predicted, 12),
        sklearn_confusion_matrix(labels, predicted, labels=every),
    )


def test_ece_agrees_with_its_definition():
    labels, probabilities = make_predictions(300, 3)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    expected = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())

    assert evaluate(labels, probabilities)["ece"].value == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 12), st.integers(0, 1000), st.floats(-2, 8))
def test_intervals_hold_their_estimate(n_samples, n_classes, seed, skill):
    labels, probabilities = make_predictions(n_samples, n_classes, seed, skill)

    for name, score in evaluate(labels, probabilities, n_resamples=50).items():
        assert 0 <= score.low <= score.value <= score.high, name
        if name != "nll":
            assert score.high <= 1


def test_intervals_are_as_wide_as_the_binomial():
    labels, probabilities = make_predictions(1000, 2, skill=0.5)

    top1 = evaluate(labels, probabilities)["top1"]

    expected = 2 * 1.96 * np.sqrt(top1.value * (1 - top1.value) / 1000)
    assert top1.high - top1.low == pytest.approx(expected, rel=0.15)


def test_same_seed_same_interval():
    labels, probabilities = make_predictions(100, 3)

    assert evaluate(labels, probabilities, seed=1) == evaluate(labels, probabilities, seed=1)
    assert evaluate(labels, probabilities, seed=1) != evaluate(labels, probabilities, seed=2)


def test_perfect_predictions():
    labels = np.arange(20) % 10

    scores = evaluate(labels, np.eye(10)[labels])

    for name in ("top1", "top5", "macro_f1", "mean_per_class_accuracy"):
        assert scores[name].value == 1
    assert scores["ece"].value == 0
    assert scores["nll"].value == pytest.approx(0)
    # Twenty right of twenty is no proof of perfection.
    assert scores["top1"].low == pytest.approx(0.025 ** (1 / 20))


def test_impossible_truth_is_an_error_at_a_finite_cost():
    probabilities = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])

    scores = evaluate(np.array([0, 2]), probabilities)

    assert scores["top1"].value == 0.5
    assert scores["nll"].value == pytest.approx(-0.5 * np.log(np.finfo(np.float32).eps))


def test_top5_needs_ten_classes():
    assert "top5" not in evaluate(*make_predictions(20, 9))
    assert "top5" in evaluate(*make_predictions(20, 10))


def test_ties_rank_by_column():
    assert rank_of_truth(np.array([2, 0]), np.full((2, 4), 0.25)).tolist() == [2, 0]


def test_order_of_samples_does_not_matter():
    labels, probabilities = make_predictions(50, 4)
    order = np.random.default_rng(0).permutation(50)

    first, second = (
        {name: score.value for name, score in evaluate(y, p, n_resamples=0).items()}
        for y, p in ((labels, probabilities), (labels[order], probabilities[order]))
    )

    assert first == pytest.approx(second)


def test_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="0 samples to score"):
        evaluate(np.zeros(0, int), np.zeros((0, 3)))


def test_score_reads_well():
    assert str(Score(0.93121, 0.9, 0.95)) == "0.931 [0.900, 0.950]"


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 50), st.integers(0, 1000))
def test_temperature_finds_the_scale_and_keeps_the_winner(scale, seed):
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(4000, 3))
    labels = np.array([rng.choice(3, p=p) for p in softmax(logits)])

    temperature = fit_temperature(logits * scale, labels)

    assert temperature == pytest.approx(scale, rel=0.1)
    np.testing.assert_array_equal(
        softmax(logits * scale / temperature).argmax(axis=1), logits.argmax(axis=1)
    )


def test_temperature_stays_above_zero_where_all_are_right():
    labels = np.array([0, 1, 0, 1])
    logits = np.eye(2)[labels]

    probabilities = softmax(logits / fit_temperature(logits, labels))

    assert 0.6 < probabilities.max() < 0.99


def test_temperature_ignores_classes_that_the_head_did_not_know():
    logits = np.array([[1.0, -np.inf, 0.0], [0.0, -np.inf, 1.0], [1.0, -np.inf, 0.0]])

    assert np.isfinite(fit_temperature(logits, np.array([0, 1, 2])))
    assert fit_temperature(logits, np.array([1, 1, 1])) == 1.0
    assert fit_temperature(np.zeros((0, 3)), np.zeros(0, int)) == 1.0
