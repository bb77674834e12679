"""Times dispatch, expert GEMMs and combine of each backend on this host's GPUs, beside the library's own calls.

    python -m toolkit.engine.moe.bench --ranks 2 --shape qwen3-30b-a3b --out bench.json

Starts its ranks itself. Steps without prefill are timed as replays of a CUDA graph where they can be captured; prefill
steps as they are launched, the host 200 us ahead. ``library`` is DeepEP's own calls with the same rows; ``ratio`` is
ours over it, both from the same process. Times are medians, with the fastest and slowest in brackets.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from toolkit.config.engine import EngineConfig
from toolkit.config.parallel import ParallelConfig
from toolkit.engine import device as devices
from toolkit.engine.dims import ParallelDims
from toolkit.engine.moe.dispatch import Dispatched, ExpertShape, StepRows, TokenDispatcher, make_dispatcher
from toolkit.engine.moe.gemm import ExpertGemm, ExpertWeights, make_gemm
from toolkit.engine.parallel import Groups

ROUNDS = 10  # round trips in one captured graph
BACKLOG = 400_000  # cycles, about 200 us


@dataclass(frozen=True)
class Model:
    """Hidden size, expert FFN columns, experts, top-k."""

    hidden: int
    ffn: int
    experts: int
    top_k: int


MODELS = {"qwen3-30b-a3b": Model(2048, 768, 128, 8), "deepseek-v3": Model(7168, 2048, 256, 8)}


@dataclass(frozen=True)
class Variant:
    """One backend: ``name`` is dispatcher/buffer/type."""

    name: str
    dispatcher: str
    buffer: str
    fp8: bool

    @classmethod
    def parse(cls, name: str) -> Variant:
        dispatcher, buffer, dtype = name.split("/")
        return cls(name, dispatcher, buffer, dtype == "fp8")


@dataclass(frozen=True)
class Row:
    """Microseconds of one measurement."""

    model: str
    variant: str
    rows: int
    phase: str
    what: str
    us: float
    fastest: float
    slowest: float
    ratio: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count(), help="GPUs of this host; all of them")
    parser.add_argument("--shape", choices=MODELS, action="append", help="may be repeated; both")
    parser.add_argument("--variants", nargs="+", default=list(DEFAULT), help=f"dispatcher/buffer/type: {DEFAULT}")
    parser.add_argument("--decode", type=int, nargs="*", default=[32, 128, 256], help="rows a rank")
    parser.add_argument("--prefill", type=int, nargs="*", default=[4096], help="rows a rank")
    parser.add_argument("--samples", type=int, default=20, help="timings that a median is of")
    parser.add_argument("--port", type=int, default=29511, help="where ranks meet, on loopback")
    parser.add_argument("--out", type=Path, help="a JSON file with all figures")
    options = parser.parse_args()
    if options.ranks < 1:
        sys.exit("no GPU on this machine: --ranks says how many to use")
    options.shape = options.shape or list(MODELS)
    spawn(_rank, (options,), nprocs=options.ranks)


DEFAULT = (
    "deepep/v2/bf16", "deepep/legacy/bf16", "deepep/v2/fp8", "deepep/legacy/fp8", "nvlink/-/bf16", "nvlink/-/fp8",
    "allgather/-/bf16",
)  # fmt: skip


def _rank(rank: int, options: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    devices.use("cuda", rank)
    n = options.ranks
    dims = ParallelDims.of(ParallelConfig(n, n, n, enable_dp_attention=True))
    groups = Groups.connect(dims, rank, "127.0.0.1", options.port, "cuda")
    found: list[Row] = []
    with torch.inference_mode():
        for name in options.shape:
            for variant in map(Variant.parse, options.variants):
                try:
                    for row in measure(groups, name, variant, options):
                        found.append(row)
                        _show(row, rank)
                except Exception:
                    logging.error("%s %s failed\n%s", name, variant.name, traceback.format_exc())
                torch.cuda.empty_cache()
                if rank == 0 and options.out:
                    options.out.write_text(json.dumps([asdict(row) for row in found], indent=1))
    sys.stdout.flush()
    os._exit(0)  # GPU libraries may wait for their peers in destructors


def _show(row: Row, rank: int) -> None:
    if rank == 0:
        ratio = "" if row.ratio is None else f"  ratio {row.ratio:.2f}"
        spread = f"[{row.fastest:.1f} .. {row.slowest:.1f}]"
        print(  # noqa: T201  the table is what this program is for
            f"{row.model:14} {row.variant:18} {row.phase:8} {row.rows:5} {row.what:24} {row.us:9.1f} us "
            f"{spread}{ratio}",
            flush=True,
        )


def measure(groups: Groups, name: str, variant: Variant, options: argparse.Namespace) -> Iterator[Row]:
    """All figures of one model and backend."""
    model, ranks = MODELS[name], groups.moe.size
    decode, prefill, samples = options.decode, options.prefill, options.samples
    engine = EngineConfig(deepep_buffer="auto" if variant.buffer == "-" else variant.buffer)  # type: ignore[arg-type]
    gemm = make_gemm("auto", "cuda")
    shape = ExpertShape(
        model.experts, groups.ep_rank, ranks, model.hidden, model.top_k, gemm.alignment, gemm.decode_alignment,
        max_rows=max([*prefill, *decode]), max_decode_rows=max(decode, default=1), fp8=variant.fp8,
    )  # fmt: skip
    dispatcher = make_dispatcher(variant.dispatcher, groups.moe, shape, engine)
    gemm.pack(random_experts(model, shape.num_local, variant.fp8))
    for rows, is_extend in [(r, False) for r in decode] + [(r, True) for r in prefill]:
        step = StepRows((rows,) * ranks, is_extend)
        trip = Trip(dispatcher, gemm, model, step, groups.moe.rank)
        trip.whole()
        graph = dispatcher.capturable(step) and not is_extend
        parts: dict[str, Callable[[], object]] = {
            "dispatch+combine": trip.travel, "dispatch": trip.dispatch, "experts": trip.experts,
            "dispatch+experts+combine": trip.whole,
        }  # fmt: skip
        if not is_extend:
            del parts["dispatch"]  # low-latency buffers alternate: they want a combine after each dispatch
        library = trip.library()
        baseline = time_us(library, groups, graph, samples) if library is not None else None
        phase = "prefill" if is_extend else "decode"
        if baseline is not None:
            yield Row(name, variant.name, rows, phase, "library dispatch+combine", *baseline)
        for what, call in parts.items():
            took = time_us(call, groups, graph, samples)
            ratio = took[0] / baseline[0] if baseline is not None and what == "dispatch+combine" else None
            yield Row(name, variant.name, rows, phase, what, *took, ratio)


def random_experts(model: Model, slots: int, fp8: bool) -> ExpertWeights:
    """Experts of one rank; one random matrix serves all, in its own memory each."""

    def weight(rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        one = torch.randn(rows, columns, device="cuda") / columns**0.5
        if not fp8:
            return one.to(torch.bfloat16).repeat(slots, 1, 1), None
        from toolkit.engine.fp8 import quantize_blocks

        made = quantize_blocks(one)
        return made.weight_NK.repeat(slots, 1, 1), made.scales.repeat(slots, 1, 1)

    (gate_up, gate_up_scales), (down, down_scales) = (
        weight(2 * model.ffn, model.hidden),
        weight(model.hidden, model.ffn),
    )
    return ExpertWeights(gate_up, down, gate_up_scales, down_scales)


class Trip:
    """One step's rows, and the parts of their way."""

    def __init__(self, dispatcher: TokenDispatcher, gemm: ExpertGemm, model: Model, step: StepRows, rank: int) -> None:
        generator = torch.Generator("cuda").manual_seed(rank)
        rows = step.rows[rank]
        self.dispatcher, self.gemm, self.model, self.step = dispatcher, gemm, model, step
        self.x = torch.randn(rows, model.hidden, generator=generator, device="cuda", dtype=torch.bfloat16)
        scores = torch.rand(rows, model.experts, generator=generator, device="cuda")
        self.weights, self.ids = scores.topk(model.top_k, dim=-1)
        self.rows: Dispatched | None = None
        self.y: Tensor | None = None

    def dispatch(self) -> tuple[Dispatched, Any]:
        d = self.dispatcher
        return d.dispatch_finish(d.dispatch_start(self.x, self.ids, self.weights, self.step))

    def travel(self) -> Tensor:
        """Dispatch and combine; what is combined is whatever lies in a buffer of the right shape."""
        rows, handle = self.dispatch()
        if self.y is None or self.y.shape != rows.x.shape:
            self.y = torch.zeros(rows.x.shape, dtype=torch.bfloat16, device="cuda")
        return self.dispatcher.combine_finish(self.dispatcher.combine_start(self.y, handle))

    def whole(self) -> Tensor:
        self.rows, handle = self.dispatch()
        return self.dispatcher.combine_finish(self.dispatcher.combine_start(self.gemm(self.rows), handle))

    def experts(self) -> Tensor:
        assert self.rows is not None
        return self.gemm(self.rows)

    def library(self) -> Callable[[], object] | None:
        """DeepEP's own calls with this step's rows, as its test makes them: quantised before, nothing else between."""
        from toolkit.engine.moe.deepep import DeepEPDispatcher

        if not isinstance(self.dispatcher, DeepEPDispatcher):
            return None
        return self.dispatcher.transports[self.dispatcher.way(self.step)].library_calls(
            self.dispatcher.way(self.step), self.x, self.ids, self.weights, self.step
        )


def time_us(call: Callable[[], object], groups: Groups, graph: bool, samples: int) -> tuple[float, float, float]:
    """Median, fastest and slowest microseconds of one call."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    rounds, run = 1, call
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(ROUNDS):
                call()
        rounds, run = ROUNDS, captured.replay
    taken = []
    for _ in range(samples):
        groups.moe.all_reduce(torch.zeros(1, device="cuda"))  # ranks begin together
        torch.cuda._sleep(BACKLOG)  # the host is ahead of the GPU, as it is inside a model
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(1000 * begin.elapsed_time(end) / rounds)
    return statistics.median(taken), min(taken), max(taken)


if __name__ == "__main__":
    main()
