"""The small kernels of a decode step beside the calls that they take the place of, on one GPU.

    python -m toolkit.engine.bench.kernels [--rows 32 128 256] [--out FILE]

Each is timed as CUDA graphs of many calls that follow one another, over several copies of the large weights, so that
those are not read from L2. Microseconds a call: median of repeats, the fastest and slowest but one in brackets, and the
ratio to the other way, torch's unless said, in the same process. ``WIDEEP_PDL=0`` before the command: kernels do not
overlap their starts. Shapes are Qwen3-30B-A3B's, the gate by groups DeepSeek-V3's. Experts are those of one GPU of
four, rows come from all four, and beside them is DeepGEMM with SwiGLU between its products. EPLB's weighted choice of
replicas, beside the dynamic one's calls, is of both, of a larger group, and of a prefill chunk. What several ranks do
together is in ``toolkit.engine.moe.bench``, attention in ``toolkit.engine.bench.attention``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.engine import device as devices
from toolkit.engine.eplb.replicas import DynamicChoice, WeightedOnDevice
from toolkit.engine.gpu_libraries import has_deep_gemm
from toolkit.engine.late import late_linear
from toolkit.engine.layers import RMSNorm
from toolkit.engine.moe.bench import MODELS, random_experts
from toolkit.engine.moe.dispatch import Dispatched
from toolkit.engine.moe.gate import GroupedSigmoidGate, SoftmaxGate
from toolkit.engine.moe.gemm import ExpertWeights
from toolkit.engine.moe.place import place

COPIES, CALLS, REPEATS = 8, 48, 20
HIDDEN, WIDE, EXPERTS, TOP_K = 2048, 4096, 128, 8
ALIGNMENT = 64  # of slots in decode

Call = Callable[[int], object]
"""Does the work once, with the given copy of the weights."""


@dataclass(frozen=True)
class Row:
    what: str
    rows: int
    us: float
    low: float
    high: float
    other_us: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128, 256], help="of a decode step")
    parser.add_argument("--out", type=Path, help="JSON file with every row")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU on this machine: these kernels run nowhere else")
    devices.use("cuda", 0)
    found = []
    for rows in args.rows:
        for what, ours, others in pairs(rows):
            us, low, high = time_us(ours)
            found.append(Row(what, rows, us, low, high, time_us(others)[0]))
            r = found[-1]
            ratio = f"beside {r.other_us:6.2f} us  ratio {r.us / r.other_us:.2f}"
            sys.stdout.write(f"{what:34} {rows:4} rows  {us:6.2f} us [{low:.2f} .. {high:.2f}]  {ratio}\n")
            sys.stdout.flush()
    if args.out:
        args.out.write_text(json.dumps([asdict(row) for row in found], indent=1))
    return 0


def pairs(rows: int) -> Iterator[tuple[str, Call, Call]]:
    """Ours, and torch's or a library's way to the same, by name."""
    x, wide, residual = _random(rows, HIDDEN), _random(rows, WIDE), _random(rows, HIDDEN)
    norm = RMSNorm(_Ones(), "norm", HIDDEN, 1e-6)  # type: ignore[arg-type]
    yield "add, norm", lambda i: norm.add(residual, x), lambda i: _plain_norm(residual + x, norm)
    o = [_random(HIDDEN, WIDE) / WIDE**0.5 for _ in range(COPIES)]
    yield (
        "o, add, norm",
        lambda i: norm.add(residual, late_linear(wide, o[i])),
        lambda i: norm.add(residual, F.linear(wide, o[i])),
    )
    real = torch.tensor([rows], dtype=torch.int32, device="cuda")
    table = torch.arange(-1, EXPERTS, device="cuda").roll(-1)
    gates = [SoftmaxGate(_random(EXPERTS, HIDDEN) / HIDDEN**0.5, TOP_K, True) for _ in range(COPIES)]
    yield "gate, slots", lambda i: gates[i](x, real, table), lambda i: _plain_gate(x, gates[i].weight_ED, table)
    deep, bias = _random(rows, 7168), torch.rand(256, device="cuda") / 10
    grouped = [GroupedSigmoidGate(_random(256, 7168) / 85, bias, 8, 8, 4, True, 2.5) for _ in range(COPIES)]
    yield "gate by groups", lambda i: grouped[i](deep, real), lambda i: grouped[i].plain(deep, real)
    placed, at = _random(rows * TOP_K, HIDDEN), torch.randperm(rows * TOP_K, device="cuda").view(rows, TOP_K)
    weights = torch.rand(rows, TOP_K, device="cuda")
    from toolkit.engine.kernels import rows as kernels

    yield (
        "weighted sum of placed rows",
        lambda i: kernels.gather_rows(placed, at, weights, torch.bfloat16),
        lambda i: (placed[at] * weights[..., None]).sum(1).to(torch.bfloat16),
    )
    if has_deep_gemm():
        yield "experts, 32 of 128", *_experts(rows, even=True)
        yield "experts, 32 of 128, uneven", *_experts(rows, even=False)
    for shape in ((128, 144, 4), (256, 288, 32), (384, 512, 64)):
        yield f"weighted choice, {shape[0]} in {shape[1]} on {shape[2]}", *_choices(rows, *shape)
    if rows == 256:
        yield "weighted choice, 64 x these rows", *_choices(64 * rows, 256, 288, 32)


def _experts(rows: int, even: bool) -> tuple[Call, Call]:
    """The products of the first of four GPUs, by Triton's kernels and by DeepGEMM."""
    from toolkit.engine.moe.deep_gemm import DeepGemm
    from toolkit.engine.moe.triton_gemm import TritonGemm

    given, layers = expert_rows(rows, 4, even), expert_layers(4)
    ours, library = [TritonGemm() for _ in layers], [DeepGemm() for _ in layers]
    for mine, theirs, weights in zip(ours, library, layers):
        mine.pack(weights)
        theirs.pack(weights)
    return lambda i: ours[i % len(ours)](given), lambda i: library[i % len(library)](given)


def expert_rows(rows: int, ranks: int, even: bool) -> Dispatched:
    """What the first of ``ranks`` GPUs gets, each of which has ``rows``. Uneven: expert n is chosen as n ** -0.6."""
    slots, step = EXPERTS // ranks, 1 if even else ranks
    chance = torch.ones(EXPERTS) if even else torch.arange(1, EXPERTS + 1) ** -0.6
    ids = torch.multinomial(chance.expand(ranks * rows, -1), TOP_K, generator=torch.Generator().manual_seed(0))
    local = torch.where(ids % step == 0, ids // step, -1).to("cuda")
    placed, _ = place(_random(len(ids), HIDDEN), local, torch.ones_like(local), slots, ALIGNMENT)
    return replace(placed, expected=max(1, ids.numel() // EXPERTS))


def expert_layers(ranks: int) -> list[ExpertWeights]:
    """Three layers of the first GPU's experts: at 302 MB a layer of four GPUs nothing is left in L2."""
    return [random_experts(MODELS["qwen3-30b-a3b"], EXPERTS // ranks, fp8=False) for _ in range(3)]


def _choices(rows: int, experts: int, slots: int, ranks: int) -> tuple[Call, Call]:
    """The weighted and the dynamic choice of a replica for skewed ids, redundant slots to the first experts."""
    shape = (COPIES, experts, slots, 0, ranks, 1, "cuda")
    weighted, dynamic = WeightedOnDevice(*shape), DynamicChoice(*shape)
    rng = np.random.default_rng(0)
    for layer in range(COPIES):
        phy2log = rng.permutation(np.arange(slots) % experts)
        weighted.update(layer, weighted.prepare(phy2log))
        dynamic.update(layer, dynamic.prepare(phy2log))
    chance = torch.arange(1, experts + 1, device="cuda") ** -0.6
    ids = torch.multinomial(chance.expand(rows, -1), TOP_K)
    return lambda i: weighted(i, ids), lambda i: dynamic(i, ids)


class _Ones:
    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.ones(shape, dtype=torch.bfloat16, device="cuda")


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _plain_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.eps)


def _plain_gate(x: Tensor, weight: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = F.linear(x, weight).float().softmax(-1).topk(TOP_K, dim=-1)
    return table[ids], weights / weights.sum(-1, keepdim=True)


def time_us(call: Call) -> tuple[float, float, float]:
    """Median, fastest but one and slowest but one of a call's microseconds."""
    for copy in range(COPIES):
        call(copy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            call(i % COPIES)
    taken = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(1000 * begin.elapsed_time(end) / CALLS)
    taken.sort()
    return statistics.median(taken), taken[1], taken[-2]


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
