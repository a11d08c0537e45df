"""Every head behaves as scikit-learn expects of an estimator."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from pipeline.heads import HEADS, make_head

ESTIMATORS = [
    # The checks compare repeated samples with weighted ones to 1e-7: a strong penalty and a tight
    # tolerance let an iterative solver reach the same point twice.
    make_head("logreg", C=0.01, tol=1e-10),
    make_head("linear", lr=0.2, epochs=40, batch_size=32),
    make_head("svm", kernel="linear", C=1e-4, tol=1e-12),
    make_head("svm", kernel="rbf", tol=1e-9),
    make_head("mlp", hidden=64),
    make_head("mlp", hidden=64, early_stopping=True),
    make_head("ridge"),
    make_head("knn", k=5),
    make_head("knn", k=5, metric="euclidean"),
    make_head("prototype"),
]


def test_every_head_is_checked():
    assert {type(head) for head in ESTIMATORS} == {type(make_head(name)) for name in HEADS}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks(ESTIMATORS)
def test_scikit_learn_contract(estimator, check):
    check(estimator)
