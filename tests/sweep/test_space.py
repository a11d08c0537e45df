"""Parameters as they are written on the command line."""

import numpy as np
import pytest

from pipeline.errors import UnknownNameError, UsageError
from pipeline.heads import HEADS, head_class
from pipeline.sweep.space import (
    SPACES,
    Choice,
    Range,
    grid_of,
    params_of,
    parse_param,
    space_of,
    with_params,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("C=0.1", ("", "C", Choice((0.1,)))),
        ("k=1,5, 20", ("", "k", Choice((1, 5, 20)))),
        ("C=1e-4:1e4:30", ("", "C", Range(1e-4, 1e4, 30))),
        ("C=1e-4:1e4", ("", "C", Range(1e-4, 1e4, 10))),
        ("k=1:100:5", ("", "k", Range(1, 100, 5, whole=True))),
        ("mlp.hidden=256,512x256", ("mlp", "hidden", Choice((256, (512, 256))))),
        ("kernel=linear,rbf", ("", "kernel", Choice(("linear", "rbf")))),
        (" svm.class_weight = balanced,none", ("svm", "class_weight", Choice(("balanced", None)))),
        ("mlp.early_stopping=true,false", ("mlp", "early_stopping", Choice((True, False)))),
    ],
)
def test_what_is_written_is_what_is_meant(text, expected):
    assert parse_param(text) == expected


@pytest.mark.parametrize("text", ["C", "=1", "C=", ".C=1", "C= "])
def test_what_is_no_parameter_is_refused(text):
    with pytest.raises(UsageError, match="not of the form NAME=VALUES"):
        parse_param(text)


@pytest.mark.parametrize("text", ["C=0:1", "C=1:1", "C=2:1", "C=1:2:1", "C=a:b", "C=1:2:3:4"])
def test_ranges_that_are_none_are_refused(text):
    with pytest.raises(UsageError, match="expected LOW:HIGH or LOW:HIGH:COUNT"):
        parse_param(text)


def test_a_range_is_even_in_its_logarithm():
    values = Range(1e-6, 1e6, 13).values()

    np.testing.assert_allclose(np.diff(np.log10(values)), 1, atol=1e-5)
    assert Range(1, 10, 50, whole=True).values() == list(range(1, 11))


def test_draws_stay_within():
    rng = np.random.default_rng(0)
    drawn = [Range(1e-3, 10).draw(rng) for _ in range(500)]

    assert min(drawn) >= 1e-3
    assert max(drawn) <= 10
    assert np.mean(np.array(drawn) < 0.1) == pytest.approx(0.5, abs=0.08)


def test_a_parameter_goes_to_every_head_that_has_it():
    found = params_of(["logreg", "svm", "knn"], [parse_param("C=1:10:2"), parse_param("knn.k=3")])

    # 1:10 has whole ends, but C takes what lies between them.
    assert found == {
        "logreg": {"C": Range(1, 10, 2)},
        "svm": {"C": Range(1, 10, 2)},
        "knn": {"k": Choice((3,))},
    }


def test_a_parameter_that_no_head_has_is_refused():
    with pytest.raises(UnknownNameError, match="Unknown parameter of logreg and ridge 'gamma'"):
        params_of(["logreg", "ridge"], [parse_param("gamma=1")])
    with pytest.raises(UnknownNameError, match="Unknown head of a parameter 'mlp'"):
        params_of(["logreg"], [parse_param("mlp.lr=1")])


def test_values_take_the_place_of_the_grids_and_keep_the_rest():
    grid = with_params(
        [{"kernel": "linear", "C": 1.0}, {"kernel": "linear", "C": 2.0}, {"kernel": "rbf", "C": 1}],
        {"C": Choice((5, 6))},
    )

    assert sorted(map(str, grid)) == sorted(
        str({"kernel": kernel, "C": C}) for kernel in ("linear", "rbf") for C in (5, 6)
    )


def test_named_grids():
    assert len(grid_of("logreg", "clip", {})) == 96
    assert len(grid_of("logreg", "byol", {})) == 45
    assert grid_of("knn", "clip", {}) == grid_of("knn", "default", {})
    with pytest.raises(UnknownNameError, match="Unknown grid 'clop'"):
        grid_of("logreg", "clop", {})


@pytest.mark.parametrize("head", HEADS)
def test_every_head_has_a_grid_and_a_space_of_its_own_parameters(head):
    names = set(head_class(head).parameter_names())

    for grid in ("default", "quick"):
        assert all(set(setting) <= names for setting in grid_of(head, grid, {}))
    assert set(SPACES[head]) <= names
    assert set(space_of(head, {})) == set(SPACES[head])
