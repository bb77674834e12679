"""From the ranks' step times to figures: tokens a second and GPU, the floor of the same step, kernel shares.

A figure is of the slowest rank's clock: all ranks end a step together, so the mean over ranks of a step's time is
taken. Decode counts steps in which every DP rank decodes its full batch and nobody prefills; prefill counts those in
which somebody prefills. Knows no torch.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence

import msgspec

from toolkit.engine.bench.rank import Job, RankResult
from toolkit.engine.bench.roofline import Rates, Roofline
from toolkit.engine.bench.streams import NOTHING, Attribution, Kernel

GB = 10**9
COLUMNS = ("requests a rank", "prefill tok/s/GPU", "of floor", "decode tok/s/GPU", "of floor", "step ms (p10-p90)",
           "floor ms", "kernels ms", "profiled step ms")  # fmt: skip


class Figures(msgspec.Struct, frozen=True):
    """One point; rates are tokens a second and GPU, times milliseconds. ``share``: of the floor, 1 is the best."""

    batch: int
    prefill_tok_s_gpu: float
    prefill_floor_tok_s_gpu: float
    prefill_share: float
    decode_tok_s_gpu: float
    decode_floor_tok_s_gpu: float
    decode_share: float
    step_ms_median: float
    step_ms_p10: float
    step_ms_p90: float
    floor_ms: float
    decode_steps: int
    kernels_ms: float
    profiled_step_ms: float


def figures(job: Job, results: Sequence[RankResult], roofline: Roofline) -> list[Figures]:
    """One row a batch size that all ranks have done."""
    rates = Rates(min(r.bytes_s for r in results), min(r.flops_s for r in results))
    return [_point(job, results, roofline, rates, i) for i in range(min(len(r.points) for r in results))]


def _point(job: Job, results: Sequence[RankResult], roofline: Roofline, rates: Rates, index: int) -> Figures:
    batch, dims = job.batches[index], roofline.dims
    ranks = [r.points[index] for r in results]
    steps = list(zip(*(p.steps for p in ranks)))
    leaders = [dims.leader(dp) for dp in range(dims.dp_size)]
    full = [s for s in steps if not s[0].any_prefill and all(s[r].decode == batch for r in leaders)]
    extend = [s for s in steps if s[0].any_prefill]
    decode_s = [statistics.fmean(t.seconds for t in s) for s in full]
    prefill_s = sum(statistics.fmean(t.seconds for t in s) for s in extend)
    prefilled = sum(s[r].prefill for s in extend for r in leaders)
    context = job.isl + job.osl / 2
    floor = roofline.decode(batch, context).seconds(rates)
    chunk = roofline.engine.chunked_prefill_size
    prefill_floor = roofline.prefill(min(batch * job.isl, chunk), job.isl).seconds(rates)
    per_gpu = dims.dp_size / dims.tp_size
    decode_rate = batch * per_gpu / statistics.fmean(decode_s) if decode_s else 0.0
    prefill_rate = prefilled / dims.tp_size / prefill_s if prefill_s else 0.0
    prefill_best = min(batch * job.isl, chunk) * per_gpu / prefill_floor
    ordered = sorted(decode_s) or [0.0]
    return Figures(
        batch=batch,
        prefill_tok_s_gpu=prefill_rate,
        prefill_floor_tok_s_gpu=prefill_best,
        prefill_share=prefill_rate / prefill_best,
        decode_tok_s_gpu=decode_rate,
        decode_floor_tok_s_gpu=batch * per_gpu / floor,
        decode_share=decode_rate * floor / (batch * per_gpu),
        step_ms_median=statistics.median(ordered) * 1e3,
        step_ms_p10=ordered[len(ordered) // 10] * 1e3,
        step_ms_p90=ordered[len(ordered) * 9 // 10] * 1e3,
        floor_ms=floor * 1e3,
        decode_steps=len(decode_s),
        kernels_ms=ranks[0].profiled.busy_us / 1e3,
        profiled_step_ms=ranks[0].profiled_wall_us / 1e3,
    )


def text(job: Job, results: Sequence[RankResult], rows: Sequence[Figures], top: int = 18) -> str:
    """The report as Markdown."""
    first = results[0]
    memory = ", ".join(f"{kind} {size / GB:.2f} GB" for kind, size in first.memory.items())
    lines = [
        f"# {job.model.name}, {job.isl} + {job.osl} tokens, {len(results)} x {first.device}",
        "",
        f"- Attention {first.attention}, dispatch {first.dispatcher}, experts {job.engine.moe_runner_backend}, "  # noqa: ISC004
        f"{job.model.dtype}, pages of {job.engine.page_size} tokens; graphs for {first.graphs or 'no sizes'}.",
        f"- Rank 0: {memory}; {first.kv_tokens} KV tokens; ready after {first.load_s:.0f} s.",
        f"- Measured here: copy {first.bytes_s / 1e12:.2f} TB/s, matrix product {first.flops_s / 1e12:.0f} TFLOP/s.",
        "- The floor reads each used weight and each cached token once, or does the arithmetic: what takes longer.",
        "- A kernel's time is what it adds to its stream, after the one before it; it lasts longer where it waits.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for f in rows:
        lines.append(
            f"| {f.batch} | {f.prefill_tok_s_gpu:,.0f} | {f.prefill_share:.1%} | {f.decode_tok_s_gpu:,.0f} | "
            f"{f.decode_share:.1%} | {f.step_ms_median:.2f} ({f.step_ms_p10:.2f}-{f.step_ms_p90:.2f}) | "
            f"{f.floor_ms:.2f} | {f.kernels_ms:.2f} | {f.profiled_step_ms:.2f} |"
        )
    for point in first.points[: len(rows)]:
        if point.profiled.kernels:
            lines += ["", f"## Kernels of a decode step, {point.batch} requests", ""]
            lines += kernel_table(point.profiled, top)
    return "\n".join(lines) + "\n"


def kernel_table(profiled: Attribution, top: int) -> list[str]:
    """The kernels that add most, the time in which nothing runs, and what is left, as shares of a step."""
    shown = [k for i, k in enumerate(profiled.kernels) if i < top or k.name == NOTHING]
    rest = [k for k in profiled.kernels if k not in shown]
    lines = ["| share | us a step | lasts us | calls | kernel |", "|---|---|---|---|---|"]
    named = [(k, f"{k.calls:g}", k.name if k.name == NOTHING else f"`{k.name[:100]}`") for k in shown]
    left = Kernel("", sum(k.us for k in rest), 0.0, sum(k.duration_us for k in rest))
    for k, calls, name in [*named, (left, "", f"{len(rest)} more")]:
        lines.append(f"| {k.us / profiled.span_us:.1%} | {k.us:.1f} | {k.duration_us:.1f} | {calls} | {name} |")
    if beside := sum(k.beside_us for k in profiled.kernels):
        over = sum(k.us for k in profiled.kernels) / profiled.span_us - 1
        lines += ["", f"{beside:.1f} us of these ran beside a kernel of another stream: in all {over:.1%} over a step."]
    return lines


def kernels_csv(job: Job, results: Sequence[RankResult]) -> str:
    """Every kernel of every rank and batch size, and the time in which nothing ran."""
    out = io.StringIO()
    writer = csv.writer(out)
    names = ("us_per_step", "calls_per_step", "duration_us_per_step", "beside_us_per_step")
    writer.writerow(["rank", "batch", "kernel", *names])
    for result in results:
        for point in result.points:
            for k in point.profiled.kernels:
                figures = (f"{k.us:.3f}", f"{k.calls:g}", f"{k.duration_us:.3f}", f"{k.beside_us:.3f}")
                writer.writerow([result.rank, point.batch, k.name, *figures])
    return out.getvalue()
