"""Scaling is learned on the training samples, whatever their order."""

import numpy as np
import pytest

from pipeline.errors import CorruptStoreError, StoreFormatError, UnknownNameError
from pipeline.heads.scaling import fit_scaler, scaler_from_arrays


@pytest.fixture(name="X")
def features():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(100, 6)) * 5 + 100).astype(np.float32)


def test_standardised_features_have_no_mean_and_unit_variance(X):
    scaled = fit_scaler(X, "standardise")(X)

    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(scaled.std(axis=0), 1, atol=1e-4)


def test_order_of_samples_does_not_matter(X):
    shuffled = X[np.random.default_rng(1).permutation(len(X))]

    first, second = fit_scaler(X, "standardise"), fit_scaler(shuffled, "standardise")

    np.testing.assert_allclose(first.mean, second.mean, rtol=1e-12)
    np.testing.assert_allclose(first.scale, second.scale, rtol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567, 60000.0])
def test_constant_features_keep_their_scale(X, value):
    X[:, 2] = value

    scaler = fit_scaler(X, "standardise")

    assert scaler.scale[2] == 1
    np.testing.assert_allclose(scaler(X)[:, 2], 0, atol=1e-2)


def test_each_block_gets_its_own_length(X):
    scaled = fit_scaler(X, "l2", widths=(2, 4))(X)

    np.testing.assert_allclose(np.linalg.norm(scaled[:, :2], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(scaled[:, 2:], axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", ["standardise", "l2", "none"])
def test_scaling_leaves_its_input_alone_and_comes_back_from_arrays(X, kind):
    before = X.copy()
    scaler = fit_scaler(X, kind, (3, 3))

    back = scaler_from_arrays(kind, (3, 3), scaler.to_arrays())

    np.testing.assert_array_equal(back(X), scaler(X))
    np.testing.assert_array_equal(X, before)
    assert scaler(X) is not X


@pytest.mark.parametrize("kind", ["standardise", "l2", "none"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_some_rows_and_halves_are_scaled_as_all_are(X, kind, dtype, monkeypatch):
    monkeypatch.setattr("pipeline.heads.scaling._BLOCK_ROWS", 7)
    X = X.astype(dtype)
    scaler = fit_scaler(X.astype(np.float32), kind, (3, 3))
    expected = scaler(X.astype(np.float32))
    rows = np.array([99, 0, 3, 3, *range(20, 60)])
    out = np.empty((10, 6), np.float32)
    locked = X.copy()
    locked.flags.writeable = False

    np.testing.assert_array_equal(scaler(X), expected)
    np.testing.assert_array_equal(scaler(X[::-2]), expected[::-2])
    np.testing.assert_array_equal(scaler(locked), expected)
    np.testing.assert_array_equal(scaler.rows(X, rows), expected[rows])
    assert scaler(X[:10], out=out) is out
    np.testing.assert_array_equal(out, expected[:10])


def test_unknown_scaling_offers_close_ones(X):
    with pytest.raises(UnknownNameError, match="Did you mean: standardise"):
        fit_scaler(X, "standardize")
    with pytest.raises(StoreFormatError, match="known: standardise, l2, none"):
        scaler_from_arrays("whiten", (2,), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": None}, "'mean' of the model's scaling holds nothing, expected 2 float"),
        ({"scale": np.ones(3)}, r"holds float64 of shape \(3,\)"),
        ({"scale": np.array([1.0, 0.0])}, "not above zero"),
        ({"mean": np.array([1.0, np.inf])}, "not finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, message):
    arrays = {"mean": np.zeros(2), "scale": np.ones(2)} | change

    with pytest.raises(CorruptStoreError, match=message):
        scaler_from_arrays(
            "standardise", (2,), {name: v for name, v in arrays.items() if v is not None}
        )
