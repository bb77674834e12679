"""Expert imbalance joined with latency: what the same moments looked like to the GPUs and to the users.

Owns the join of recorder windows (experts.npz) with forward passes (steps/) and token gaps (requests.parquet) on the
clock, and the model of a pass that says how much of it is waiting for the busiest GPU. The load is imbalance.py's, the
latency metrics.py's, the fit stats.py's.

A moment is one recorder window. Its passes are those whose middle lies in it, its tokens those that arrived in it.
The three clocks are the hosts' own: on several nodes they must agree to a fraction of a window (NTP does).
Read next: findings.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from toolkit.analysis.load import Run
from toolkit.analysis.metrics import itl_at
from toolkit.analysis.stats import Estimate, Model, correlation, linear_model
from toolkit.analysis.steady import ended

Floats = NDArray[np.float64]

MOMENT_COLUMNS = (
    "point", "concurrency", "begin", "end", "passes", "step_ms", "tokens", "prefill_tokens", "dp_excess",
    "imbalance", "balancedness", "excess", "busiest", "itl_ms", "itl_tokens",
)  # fmt: skip


def passes(steps: pd.DataFrame) -> pd.DataFrame:
    """Rows of DP ranks -> one row a forward pass of the worker, in the order of time.

    ``t_mid`` Unix s; ``step_ms`` the longest of the ranks (they end together); ``tokens`` and ``prefill_tokens`` of
    all ranks; ``dp_excess`` tokens of the busiest DP rank above the mean one: uneven attention work.
    """
    columns = ["step", "t_mid", "step_ms", "tokens", "prefill_tokens", "dp_excess"]
    if steps.empty:
        return pd.DataFrame({name: np.empty(0) for name in columns})
    by_pass = steps.groupby("step")
    worker = by_pass.agg(
        begin=("t_begin", "min"), step_ms=("duration_s", "max"), tokens=("tokens", "sum"),
        prefill_tokens=("prefill_tokens", "sum"), busiest=("tokens", "max"), mean=("tokens", "mean"),
    ).reset_index()  # fmt: skip
    worker["t_mid"] = worker["begin"] + worker["step_ms"] / 2
    worker["step_ms"] *= 1e3
    worker["dp_excess"] = worker["busiest"] - worker["mean"]
    return worker[columns].sort_values("t_mid", ignore_index=True)


def moments(run: Run) -> pd.DataFrame:
    """One row a recorder window that lies in a load point and has load; columns ``MOMENT_COLUMNS``.

    ``step_ms``, ``tokens``, ``prefill_tokens`` and ``dp_excess`` are means of its passes; ``imbalance``,
    ``balancedness``, ``excess`` and ``busiest`` (assignments a pass, summed over layers) are imbalance.py's;
    ``itl_ms`` is the mean ITL of the ``itl_tokens`` tokens that came in it. NaN where there were no passes or tokens.
    """
    windows = run.windows
    if windows is None or not len(windows.times_W2):
        return pd.DataFrame({name: np.empty(0) for name in MOMENT_COLUMNS})
    frame = pd.DataFrame(windows.times_W2, columns=["begin", "end"])
    frame["imbalance"], frame["balancedness"] = windows.imbalance(), windows.balancedness()
    middle = frame[["begin", "end"]].mean(axis=1).to_numpy()
    frame["point"], frame["concurrency"] = -1, -1
    for index, point in enumerate(run.points):
        if len(point.requests):
            sent, over = float(point.requests["t_send"].min()), float(ended(point.requests).max())
            frame.loc[(middle >= sent) & (middle <= over), ["point", "concurrency"]] = index, point.concurrency
    worker = passes(run.steps)
    edges = windows.times_W2
    frame["passes"] = _counts(edges, worker["t_mid"].to_numpy(np.float64))
    for name in ("step_ms", "tokens", "prefill_tokens", "dp_excess"):
        frame[name] = _means(edges, worker["t_mid"].to_numpy(np.float64), worker[name].to_numpy(np.float64))
    each = frame["passes"].where(frame["passes"] > 0)
    frame["excess"], frame["busiest"] = windows.excess() / each, windows.loads_WLG.max(-1).sum(-1) / each
    rows = run.requests[run.requests["status"] == "ok"]
    came, gaps = itl_at(rows) if len(rows) else (np.empty(0), np.empty(0))
    frame["itl_tokens"], frame["itl_ms"] = _counts(edges, came), _means(edges, came, gaps * 1e3)
    inside = (frame["point"] >= 0) & frame["imbalance"].notna()
    return frame.loc[inside, list(MOMENT_COLUMNS)].reset_index(drop=True)


@dataclass(frozen=True)
class Loss:
    """What uneven expert load cost one load point.

    Attributes:
        moments: windows it rests on.
        step_ms: mean forward pass.
        imbalance: mean of the moments, weighted with their passes.
        step_correlation, itl_correlation: Spearman's of step time and ITL with the imbalance of the same moments.
        held_ms: of each pass, time that ``PassModel`` lays to waiting for the busiest expert GPU; None where the
            moments cannot tell.
        ceiling_ms: the same if every token's whole cost were expert work: more than this the imbalance cannot cost.
        attention_ms: the same for the busiest DP rank's extra tokens.
        explained: share of the step time's variance that the model explains.
        own_fit: False when the model was fitted over all load points, this one having too few moments.
    """

    concurrency: int
    moments: int
    step_ms: float
    imbalance: float
    step_correlation: float
    itl_correlation: float
    held_ms: Estimate | None
    ceiling_ms: Estimate | None
    attention_ms: Estimate | None
    explained: float
    own_fit: bool

    @property
    def bounded(self) -> Estimate | None:
        """``held_ms``, cut at ``ceiling_ms``."""
        if self.held_ms is None or self.ceiling_ms is None:
            return self.held_ms
        held, most = self.held_ms, self.ceiling_ms
        return Estimate(min(held.value, most.value), min(held.low, most.high), min(held.high, most.high))

    @property
    def certain(self) -> bool:
        """Whether the interval of ``held_ms`` leaves zero out."""
        return self.held_ms is not None and self.held_ms.low > 0

    def sentence(self) -> str:
        at, related = f"At concurrency {self.concurrency}", f"correlation with imbalance {self.step_correlation:+.2f}"
        if self.held_ms is None:
            return f"{at}: {related}; too few or too like moments ({self.moments}) to say what the imbalance costs."
        seen = f"{self.moments} moments" + ("" if self.own_fit else ", fitted over all load points")
        if not self.certain:
            most = max(self.bounded.high if self.bounded else 0.0, 0.0)
            bound = f"at most {_two_digits(most)} ms of each" if most < self.step_ms else "any part is possible of each"
            return (
                f"{at} no wait for the busiest expert GPU can be told from noise: {bound} {self.step_ms:.3g} ms step "
                f"({related}, {seen})."
            )
        held = self.bounded or self.held_ms
        how_long = f"{_two_digits(held.value)} ms ({_two_digits(held.low)} to {_two_digits(held.high)})"
        if held.value < self.held_ms.value:  # step time grows with the load for other reasons, too
            how_long = f"{_two_digits(held.value)} ms at most"
        return (
            f"{at} the slowest rank holds the others for {how_long} of each {self.step_ms:.3g} ms step: imbalance "
            f"{self.imbalance:.2f}, {related}, {seen}."
        )


@dataclass(frozen=True)
class PassModel:
    """step = a + b tokens + c prefill_tokens + d dp_excess + e excess, by least squares over moments.

    Weighted by passes, with intervals from resampled moments. ``excess`` is what the busiest GPU has above the mean
    one, so e · mean(excess) is the part of a pass that an even load would save. Tokens and prefill are in the model
    because a fuller batch is both slower and, with more tokens to even it out, less uneven. Association, not proof: a
    cause that rises and falls with the imbalance is counted as it.
    """

    names: tuple[str, ...]
    fit: Model

    @classmethod
    def of(cls, frame: pd.DataFrame) -> PassModel | None:
        """None where the moments are too few, or too alike to tell the terms apart."""
        varying = [n for n in ("tokens", "prefill_tokens", "dp_excess") if len(frame) and np.ptp(frame[n]) > 0]
        return cls._fitted(frame, (*varying, "excess"))

    @classmethod
    def work_bound(cls, frame: pd.DataFrame) -> PassModel | None:
        """step = a + e busiest: all that a token costs is laid to the experts."""
        return cls._fitted(frame, ("busiest",))

    @classmethod
    def _fitted(cls, frame: pd.DataFrame, names: tuple[str, ...]) -> PassModel | None:
        step_ms, passes = frame["step_ms"].to_numpy(np.float64), frame["passes"].to_numpy(np.float64)
        fit = linear_model(_columns(frame, names), step_ms, passes)
        return cls(names, fit) if fit is not None else None

    def part(self, name: str, frame: pd.DataFrame, of: str = "") -> Estimate | None:
        """What the term ``name`` adds to the mean pass of ``frame``, ms; with ``of``, for as much of that column."""
        if name not in self.names:
            return None
        at = 1 + self.names.index(name)
        typical = float(np.average(frame[of or name], weights=frame["passes"]))
        return self.fit.of(lambda coefficients: coefficients[..., at] * typical)


def point_loss(frame: pd.DataFrame, concurrency: int, everywhere: pd.DataFrame | None = None) -> Loss:
    """Moments of one load point -> what the imbalance cost.

    By the point's own ``PassModel``, or where its moments are too few for one, by that of the moments ``everywhere``.
    """
    known = with_passes(frame)
    own = PassModel.of(known)
    wide = with_passes(everywhere) if everywhere is not None else known
    model = own or PassModel.of(wide)
    bound = PassModel.work_bound(known if own else wide)
    weights, uneven = known["passes"].to_numpy(np.float64), known["imbalance"].to_numpy(np.float64)
    return Loss(
        concurrency=concurrency,
        moments=len(known),
        step_ms=float(np.average(known["step_ms"], weights=weights)) if len(known) else np.nan,
        imbalance=float(np.average(uneven, weights=weights)) if len(known) else np.nan,
        step_correlation=correlation(uneven, known["step_ms"].to_numpy(np.float64), rank=True),
        itl_correlation=correlation(uneven, known["itl_ms"].to_numpy(np.float64), rank=True),
        held_ms=model.part("excess", known) if model and len(known) else None,
        ceiling_ms=bound.part("busiest", known, of="excess") if bound and len(known) else None,
        attention_ms=model.part("dp_excess", known) if model and len(known) else None,
        explained=model.fit.explained if model else np.nan,
        own_fit=own is not None,
    )


def with_passes(frame: pd.DataFrame) -> pd.DataFrame:
    """The moments in which forward passes were logged."""
    return frame[frame["step_ms"].notna() & (frame["passes"] > 0)]


def losses(run: Run) -> list[Loss]:
    """``point_loss`` of every load point that has moments with passes; few moments borrow the fit over all points."""
    frame, points = moments(run), run.points
    found = [point_loss(frame[frame["point"] == index], point.concurrency, frame) for index, point in enumerate(points)]
    return [loss for loss in found if loss.moments]


def _columns(frame: pd.DataFrame, names: tuple[str, ...]) -> Floats:
    return np.stack([np.ones(len(frame)), *(frame[name].to_numpy(np.float64) for name in names)], axis=1)


def _counts(edges_W2: Floats, at: Floats) -> NDArray[np.int64]:
    at = np.sort(at)
    return np.searchsorted(at, edges_W2[:, 1], "left") - np.searchsorted(at, edges_W2[:, 0], "left")


def _means(edges_W2: Floats, at: Floats, values: Floats) -> Floats:
    """Mean of the values whose time lies in each window; NaN for none."""
    order = np.argsort(at, kind="stable")
    sums = np.concatenate([[0.0], np.cumsum(values[order])])
    low, high = (np.searchsorted(at[order], edges_W2[:, side], "left") for side in (0, 1))
    count = high - low
    mean: Floats = (sums[high] - sums[low]) / np.where(count > 0, count, np.nan)
    return mean


def _two_digits(ms: float) -> str:
    """Two significant digits, never in powers of ten: 3.1, 12, 150."""
    return f"{float(f'{ms:.2g}'):,g}"
