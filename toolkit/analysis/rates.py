"""Rate match: how many decode GPUs one prefill GPU feeds, from runs that load the two pools apart.

A run with ``load.phase=prefill`` says how many prompts of a length a prefill GPU computes a second, one with
``load.phase=decode`` how many answers a decode GPU generates a second with so many requests in its batch. Their ratio
is what x and y of a deployment should be. Read next: ``charts/rates.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from toolkit.analysis.goodput import Slo, goodput
from toolkit.analysis.metrics import itl_at, measured, succeeded, ttft_s
from toolkit.analysis.steady import ended

if TYPE_CHECKING:
    from toolkit.analysis.load import Run
    from toolkit.analysis.sweep_table import LoadPoint

ALIKE = 0.05  # prompts whose mean lengths differ by less are prompts of one length
GOOD_SHARE = 0.99  # of a point's requests must keep a bound; the default of load.slo_share
COLUMNS = (
    "model", "isl", "osl", "concurrency", "tpot_ms", "decode_tok_s_per_gpu", "decode_req_s_per_gpu",
    "prefill_concurrency", "ttft_p99_ms", "prefill_req_s_per_gpu", "decode_gpus", "keeps", "chosen", "run",
    "prefill_run",
)  # fmt: skip


def rate_match(runs: Sequence[Run], slo: Slo) -> pd.DataFrame:
    """A row (``COLUMNS``) for each load point of the decode runs that has a prefill run of its prompts' length.

    - ``tpot_ms``: median gap between tokens while every request of the point generates; ``decode_tok_s_per_gpu``:
      requests / that gap / GPUs of the decode pool; ``decode_req_s_per_gpu``: the same over the answers' length.
    - ``prefill_req_s_per_gpu``: most prompts a second and GPU of a point of which 99 % keep ``slo.ttft_ms``.
    - ``decode_gpus``: prefill_req_s_per_gpu / decode_req_s_per_gpu: decode GPUs that one prefill GPU feeds.
    - ``keeps``: tpot_ms is within ``slo.tpot_ms``. ``chosen``: of those of one length, the most tokens a GPU.

    Raises:
        ValueError: there is no run of one of the phases, or no pair of them fits together.
    """
    by_phase = {phase: [run for run in runs if phase_of(run) == phase] for phase in ("prefill", "decode")}
    for phase, found in by_phase.items():
        if not found:
            raise ValueError(
                f"none of the {len(runs)} runs has load.phase={phase}: a rate match needs one of each phase "
                "(python -m toolkit.launch +exp=rate_match)"
            )
    prefills = [row for run in by_phase["prefill"] for row in _prefill_rows(run, slo)]
    decodes = [row for run in by_phase["decode"] for row in _decode_rows(run)]
    pairs = [pair for row in decodes if (pair := _pair(row, prefills)) is not None]
    if not pairs:
        raise ValueError(
            "no decode point has a prefill point of the same model and prompt length within load.slo_ttft_ms: decode "
            f"has {_lengths(decodes)}, prefill {_lengths(prefills)}. A decode point counts when all its requests "
            "generate at once: raise load.osl, or take load.phase=decode"
        )
    table = pd.DataFrame(pairs)
    table["keeps"] = (table["tpot_ms"] <= slo.tpot_ms) if slo.tpot_ms else True
    best = table[table["keeps"]].groupby(["model", "isl", "osl"])["decode_tok_s_per_gpu"].idxmax()
    table["chosen"] = table.index.isin(best)
    return table.sort_values(["model", "isl", "osl", "concurrency"], ignore_index=True)[list(COLUMNS)]


def phase_of(run: Run) -> str:
    """``load.phase`` of its config; all where it does not say."""
    load = run.config.get("load")
    return str(load.get("phase", "all")) if isinstance(load, dict) else "all"


def pool_gpus(run: Run, pool: str) -> int:
    """GPUs of the workers that do ``pool``'s work; all of an aggregated or unknown deployment."""
    workers = run.plan.get("workers") or []
    return sum(len(worker["ranks"]) for worker in workers if worker.get("pool") == pool) or run.num_gpus or 1


def _prefill_rows(run: Run, slo: Slo) -> Iterable[dict[str, Any]]:
    """Points that keep the bound on TTFT."""
    gpus = pool_gpus(run, "prefill")
    for point in _valid(run):
        ok = succeeded(point.requests)
        if slo.ttft_ms and goodput(point.requests, Slo(ttft_ms=slo.ttft_ms)).share < GOOD_SHARE:
            continue
        yield {
            "model": run.settings["model"],
            "isl": float(ok["prompt_tokens"].mean()),
            "prefill_concurrency": point.concurrency,
            "ttft_p99_ms": 1e3 * float(np.percentile(ttft_s(ok), 99)),
            "prefill_req_s_per_gpu": len(ok) / float(point.row["duration_s"]) / gpus,
            "prefill_run": run.name,
        }


def _decode_rows(run: Run) -> Iterable[dict[str, Any]]:
    """Points at which, for a while, all requests generate."""
    gpus = pool_gpus(run, "decode")
    for point in _valid(run):
        ok = succeeded(point.requests)
        gap = full_gap_s(point.requests)
        if not gap > 0:
            continue
        osl = float(ok["output_tokens"].mean())
        tokens = point.concurrency / gap / gpus
        yield {
            "model": run.settings["model"],
            "isl": float(ok["prompt_tokens"].mean()),
            "osl": round(osl),
            "concurrency": point.concurrency,
            "tpot_ms": 1e3 * gap,
            "decode_tok_s_per_gpu": tokens,
            "decode_req_s_per_gpu": tokens / osl,
            "run": run.name,
        }


def _valid(run: Run) -> list[LoadPoint]:
    return [point for point in run.points if point.valid and len(succeeded(point.requests))]


def full_gap_s(requests: pd.DataFrame) -> float:
    """Median gap between tokens from the last first token to the first end; NaN when there is no such time.

    The median does not see the slow steps while the batch was filled, of which a few may be within.
    """
    counted = succeeded(requests)
    if len(counted) < len(measured(requests)):
        return np.nan  # who failed did not generate
    begin = float((counted["t_send"].to_numpy(np.float64) + ttft_s(counted)).max())
    end = float(ended(counted).min())
    times, gaps = itl_at(counted)
    within = gaps[(times - gaps >= begin) & (times <= end)]
    return float(np.median(within)) if len(within) else np.nan


def _pair(decode: dict[str, Any], prefills: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """A decode point with the fastest prefill point of its length."""
    fitting = [
        row for row in prefills
        if row["model"] == decode["model"] and abs(row["isl"] - decode["isl"]) <= ALIKE * decode["isl"]
    ]  # fmt: skip
    if not fitting:
        return None
    best = max(fitting, key=lambda row: row["prefill_req_s_per_gpu"])
    ratio = best["prefill_req_s_per_gpu"] / decode["decode_req_s_per_gpu"]
    return best | decode | {"isl": round(decode["isl"]), "decode_gpus": ratio}


def _lengths(rows: Iterable[dict[str, Any]]) -> str:
    found = sorted({f"{row['model']} at {row['isl']:.0f} tokens" for row in rows})
    return ", ".join(found) or "no point"
