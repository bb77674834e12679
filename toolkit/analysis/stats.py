"""How sure a figure is: bootstrap intervals, correlation, and a linear model with intervals.

Owns the statistics; what is measured is metrics.py's. Pure numpy, every draw seeded: the same rows give the same
interval.
An interval says what other requests of the same run could have given. It cannot know what another run would have
given; for that, repeat the load point (``Runs.combined`` shows the spread of repeats).
Read next: compare.py, join.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAWS = 2000
LEVEL = 0.95
MAX_GROUPS = 4096
ENOUGH = 5  # values expected beyond a percentile, below which resampling knows nothing of its tail


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; NaN where there are too few values for one."""

    value: float
    low: float = np.nan
    high: float = np.nan

    def __str__(self) -> str:
        if not np.isfinite(self.low):
            return f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Draws:
    """A figure, and what it would be in resamples of its rows."""

    value: float
    draws: Floats

    def estimate(self) -> Estimate:
        return Estimate(self.value, *_middle(self.draws))

    def minus(self, other: Draws) -> Estimate:
        """self - other, the two resampled independently."""
        return Estimate(self.value - other.value, *_middle(self.draws - other.draws))

    def ratio(self, other: Draws) -> Estimate:
        """self / other - 1, the two resampled independently."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return Estimate(self.value / other.value - 1, *_middle(self.draws / other.draws - 1))


def mean(values: Floats, seed: int = 0) -> Draws:
    """Mean over rows, resampled (percentile bootstrap). NaN values are left out."""
    values = values[np.isfinite(values)]
    return ratio_of_sums(values, np.ones(len(values)), seed)


def ratio_of_sums(numerator: Floats, denominator: Floats, seed: int = 0) -> Draws:
    """sum(numerator) / sum(denominator) over rows that are resampled together, e.g. seconds and tokens of a request.

    Above 4096 rows, rows are dealt at random into 4096 groups that are resampled as wholes: the same interval up to
    1 / 4096, at a cost that no longer grows with the draws.
    """
    if not len(numerator) or not denominator.sum() > 0:
        return Draws(np.nan, np.full(DRAWS, np.nan))
    value = float(numerator.sum() / denominator.sum())
    rng = np.random.default_rng(seed)
    if len(numerator) > MAX_GROUPS:
        group = rng.permutation(len(numerator)) % MAX_GROUPS
        numerator = np.bincount(group, weights=numerator).astype(np.float64)
        denominator = np.bincount(group, weights=denominator).astype(np.float64)
    if len(numerator) < 2:
        return Draws(value, np.full(DRAWS, np.nan))
    count = len(numerator)
    draws = np.empty(DRAWS)
    for at in range(0, DRAWS, 200):
        picks = rng.integers(0, count, (200, count))
        below = denominator[picks].sum(1)
        draws[at : at + 200] = numerator[picks].sum(1) / np.where(below > 0, below, np.nan)
    return Draws(value, draws)


def percentile(values: Floats, percent: float, seed: int = 0) -> Draws:
    """Linear percentile over rows, resampled. NaN values are left out.

    Without an interval where fewer than 5 values lie beyond it on average (p99: under 500 rows): resamples of so few
    repeat the same extremes and look surer than they are.

    The k-th smallest of n draws with replacement is the sample's quantile at a Beta(k, n - k + 1) variate, which is
    drawn instead of the n rows: sorting once is all that grows with the sample.
    """
    values = np.sort(values[np.isfinite(values)])
    count = len(values)
    if not count:
        return Draws(np.nan, np.full(DRAWS, np.nan))
    value = float(np.percentile(values, percent, method="linear"))
    if count * min(percent, 100 - percent) < 100 * ENOUGH:
        return Draws(value, np.full(DRAWS, np.nan))
    rank = percent / 100 * (count - 1) + 1
    below, rng = int(rank), np.random.default_rng(seed)
    uniform = rng.beta(below, count - below + 1, DRAWS)
    low = np.minimum((uniform * count).astype(np.int64), count - 1)
    if rank == below:
        return Draws(value, values[low])
    # The next order statistic, given this one: the smallest of the count - below uniforms above it.
    above = 1 - (1 - uniform) * rng.beta(count - below, 1, DRAWS)
    high = np.minimum((above * count).astype(np.int64), count - 1)
    return Draws(value, values[low] + (rank - below) * (values[high] - values[low]))


def correlation(x: Floats, y: Floats, rank: bool = False) -> float:
    """Pearson's r, or with ``rank`` Spearman's; NaN below three pairs or where one side does not vary."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if rank:
        x, y = _ranks(x), _ranks(y)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return float(np.corrcoef(x, y)[0, 1])


@dataclass(frozen=True)
class Model:
    """y = coefficients · columns by weighted least squares; ``draws`` [DRAWS, columns] from resampled rows."""

    coefficients: Floats
    draws: Floats
    explained: float  # R², of the weighted variance

    def of(self, figure: Callable[[Floats], Floats]) -> Estimate:
        """``figure``, a function of coefficients [..., columns], with its interval."""
        return Draws(float(figure(self.coefficients)), figure(self.draws)).estimate()


def linear_model(columns: Floats, y: Floats, weights: Floats, seed: int = 0, draws: int = 500) -> Model | None:
    """Least squares of ``y`` [n] on ``columns`` [n, k]; None where the rows cannot tell the columns apart."""
    count, width = columns.shape
    if count < 4 * width or (np.abs(columns).max(0) == 0).any():
        return None
    scale = np.abs(columns).max(0)
    scaled = columns / scale
    root = np.sqrt(weights / weights.mean())[:, None]
    if np.linalg.matrix_rank(scaled * root, tol=1e-6 * count) < width:
        return None

    # Normal equations of all resamples at once: a resample only changes how often each row counts.
    outer = (scaled[:, :, None] * scaled[:, None, :]).reshape(count, -1)
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), draws) * weights
    left, right = (times @ outer).reshape(draws, width, width), times @ (scaled * y[:, None])
    resampled = np.einsum("dij,dj->di", np.linalg.pinv(left, hermitian=True), right) / scale
    best = np.linalg.lstsq(scaled * root, y * root[:, 0], rcond=None)[0] / scale
    centre = np.average(y, weights=weights)
    total = float((weights * (y - centre) ** 2).sum())
    rest = float((weights * (y - columns @ best) ** 2).sum())
    return Model(best, resampled, 1 - rest / total if total > 0 else np.nan)


def _middle(draws: Floats) -> tuple[float, float]:
    known = draws[np.isfinite(draws)]
    if len(known) < 0.5 * len(draws):
        return np.nan, np.nan
    low, high = np.percentile(known, (50 - 50 * LEVEL, 50 + 50 * LEVEL))
    return float(low), float(high)


def _ranks(values: Floats) -> Floats:
    """Ranks, ties sharing their mean."""
    _, position, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: Floats = (last - (counts - 1) / 2)[position]
    return shared
