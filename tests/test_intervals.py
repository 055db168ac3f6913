"""Intervals of accuracies compared with SciPy."""

import pytest
from scipy import stats

from core.intervals import margin_of


@pytest.mark.parametrize(("accuracy", "samples"), [(0.9833, 359), (0.5, 1000), (0.1, 50)])
def test_margin_is_the_normal_approximation_of_a_binomial_share(accuracy, samples):
    low, high = stats.norm.interval(0.95, accuracy, (accuracy * (1 - accuracy) / samples) ** 0.5)
    assert margin_of(accuracy, samples) == pytest.approx((high - low) / 2, rel=1e-3)


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_margin_without_errors_follows_the_rule_of_three(accuracy):
    """3 / N is within 1% of the exact one-sided limit (Clopper and Pearson) for 100 samples and more."""
    exact = 1 - stats.beta.ppf(0.05, 200, 1)
    assert margin_of(accuracy, 200) == pytest.approx(exact, rel=0.01)
    assert margin_of(accuracy, 2) == 1
