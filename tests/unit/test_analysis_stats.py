"""Intervals and models against what can be known: coverage, plain resampling, a line with known slope."""

from __future__ import annotations

import numpy as np
import pytest

from toolkit.analysis import stats


def covered(estimates: list[stats.Estimate], truth: float) -> float:
    return float(np.mean([e.low <= truth <= e.high for e in estimates]))


@pytest.mark.parametrize(
    ("figure", "truth"),
    [
        (stats.mean, 1.0),
        (lambda x, seed: stats.percentile(x, 50, seed), np.log(2)),
        (lambda x, seed: stats.percentile(x, 90, seed), np.log(10)),
    ],
    ids=["mean", "p50", "p90"],
)
def test_intervals_hold_the_truth_about_95_times_in_100(figure, truth: float) -> None:
    rng = np.random.default_rng(3)
    estimates = [figure(rng.exponential(size=200), seed).estimate() for seed in range(300)]
    assert 0.89 < covered(estimates, truth) <= 0.99


def test_the_percentile_shortcut_draws_what_plain_resampling_draws() -> None:
    rng = np.random.default_rng(5)
    values = rng.lognormal(size=101)
    plain = np.percentile(rng.choice(values, (4000, len(values))), 87, axis=1)
    quick = stats.percentile(values, 87).draws
    np.testing.assert_allclose(np.percentile(quick, (5, 50, 95)), np.percentile(plain, (5, 50, 95)), rtol=0.06)


def test_groups_give_the_interval_of_single_rows() -> None:
    values = np.random.default_rng(0).exponential(size=20_000)
    grouped = stats.mean(values).estimate()
    error = values.std() / np.sqrt(len(values))
    assert grouped.high - grouped.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert grouped.value == pytest.approx(values.mean())


def test_a_difference_of_equals_holds_zero_and_of_unequals_does_not() -> None:
    rng = np.random.default_rng(1)
    one, same, other = (stats.mean(rng.normal(mu, 1, 400), seed) for seed, mu in enumerate((5, 5, 6)))
    equal, unequal = one.minus(same), other.minus(one)
    assert equal.low < 0 < equal.high
    assert 0.8 < unequal.low < 1 < unequal.high < 1.3
    assert other.ratio(one).value == pytest.approx(other.value / one.value - 1)


@pytest.mark.parametrize("values", [[], [1.0], [np.nan, 2.0]])
def test_too_few_values_have_no_interval(values: list[float]) -> None:
    for draws in (stats.mean(np.array(values)), stats.percentile(np.array(values), 99)):
        assert np.isnan(draws.estimate().low)


def test_the_model_finds_the_slopes_and_how_sure_it_is() -> None:
    rng = np.random.default_rng(2)
    columns = np.stack([np.ones(300), rng.uniform(0, 10, 300), rng.uniform(0, 2, 300)], axis=1)
    y = columns @ np.array([4.0, 0.5, 3.0]) + rng.normal(0, 0.5, 300)
    model = stats.linear_model(columns, y, np.ones(300))
    assert model is not None
    slope = model.of(lambda c: c[..., 2])
    assert slope.low < 3 < slope.high and slope.high - slope.low < 0.5
    assert model.explained > 0.9


def test_columns_that_cannot_be_told_apart_give_no_model() -> None:
    x = np.arange(50.0)
    assert stats.linear_model(np.stack([np.ones(50), x, 2 * x], axis=1), x, np.ones(50)) is None
    assert stats.linear_model(np.stack([np.ones(5), x[:5]], axis=1), x[:5], np.ones(5)) is None


def test_spearman_sees_a_curve_that_rises() -> None:
    x = np.linspace(1, 5, 30)
    assert stats.correlation(x, np.exp(x), rank=True) == pytest.approx(1)
    assert stats.correlation(x, np.exp(x)) < 0.95
    assert np.isnan(stats.correlation(x, np.ones(30)))
