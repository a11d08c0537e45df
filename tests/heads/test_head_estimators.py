"""Every head behaves as scikit-learn expects of an estimator.

Gradient heads, neighbours and support vectors have their variants checked beside their own tests.
"""

import re
from pathlib import Path

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from pipeline.heads import HEADS, head_class, make_head

ESTIMATORS = [
    # The checks compare repeated samples with weighted ones to 1e-7: a strong penalty and a tight
    # tolerance let an iterative solver reach the same point twice.
    make_head("logreg", C=0.01, tol=1e-18, max_iter=20),
    make_head("logreg", penalty="l1", C=0.05, tol=1e-10),
    make_head("ridge"),
]


def test_every_head_is_checked():
    checked = "".join(
        block
        for path in Path(__file__).parent.glob("test_*.py")
        for block in re.findall(
            r"^@parametrize_with_checks\(.*?^def ", path.read_text(), re.MULTILINE | re.DOTALL
        )
    )
    here = {type(head) for head in ESTIMATORS}

    missing = {
        name
        for name in HEADS
        if head_class(name) not in here and f"{head_class(name).__name__}(" not in checked
    }
    assert missing == set()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks(ESTIMATORS)
def test_scikit_learn_contract(estimator, check):
    check(estimator)
