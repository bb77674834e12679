"""The small kernels of a decode step beside the calls that they take the place of, on one GPU.

    python -m toolkit.engine.bench.kernels [--rows 32 128 256] [--out FILE]

Each is timed as CUDA graphs of many calls that follow one another, over several copies of the large weights, so that
those are not read from L2. Microseconds a call: median of repeats, the fastest and slowest but one in brackets, and the
ratio to torch's in the same process. ``WIDEEP_PDL=0`` before the command: kernels do not overlap their starts.
Shapes are Qwen3-30B-A3B's, the gate by groups DeepSeek-V3's. What several ranks do together is in
``toolkit.engine.moe.bench``, attention in ``toolkit.engine.bench.attention``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.engine import device as devices
from toolkit.engine import fused
from toolkit.engine.late import in_parts, late_linear
from toolkit.engine.layers import RMSNorm, Rotary
from toolkit.engine.moe.gate import GroupedSigmoidGate, SoftmaxGate

COPIES, CALLS, REPEATS = 8, 48, 20
HIDDEN, WIDE, QKV, EXPERTS, TOP_K = 2048, 4096, 5120, 128, 8

Call = Callable[[int], object]
"""Does the work once, with the given copy of the weights."""


@dataclass(frozen=True)
class Row:
    what: str
    rows: int
    us: float
    low: float
    high: float
    torch_us: float


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
            ratio = f"torch {r.torch_us:6.2f} us  ratio {r.us / r.torch_us:.2f}"
            sys.stdout.write(f"{what:34} {rows:4} rows  {us:6.2f} us [{low:.2f} .. {high:.2f}]  {ratio}\n")
            sys.stdout.flush()
    if args.out:
        args.out.write_text(json.dumps([asdict(row) for row in found], indent=1))
    return 0


def pairs(rows: int) -> Iterator[tuple[str, Call, Call]]:
    """Ours and torch's way to the same, by name; where a product is meant, the rest is ours both times."""
    x, wide, residual = _random(rows, HIDDEN), _random(rows, WIDE), _random(rows, HIDDEN)
    norm = RMSNorm(_Ones(), "norm", HIDDEN, 1e-6)  # type: ignore[arg-type]
    yield "add, norm", lambda i: norm.add(residual, x), lambda i: _plain_norm(residual + x, norm)
    o = [_random(HIDDEN, WIDE) / WIDE**0.5 for _ in range(COPIES)]
    yield (
        "o, add, norm",
        lambda i: norm.add(residual, late_linear(wide, o[i])),
        lambda i: norm.add(residual, F.linear(wide, o[i])),
    )
    qkv = [_random(QKV, HIDDEN) / HIDDEN**0.5 for _ in range(COPIES)]
    heads = _Heads(rows)
    yield (
        "add, norm, qkv, heads",
        lambda i: heads(_product(norm.add(residual, x)[1], qkv[i])),
        lambda i: heads(F.linear(norm.add(residual, x)[1], qkv[i])),
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


def _product(x: Tensor, weight: Tensor) -> Tensor:
    parts = in_parts(x, weight, early=True)
    return F.linear(x, weight) if parts is None else parts


class _Heads:
    """What follows the product: norms of heads, RoPE, the write into a cache."""

    def __init__(self, rows: int) -> None:
        norm = RMSNorm(_Ones(), "head", 128, 1e-6)  # type: ignore[arg-type]
        self.norms = (norm, norm)
        self.rotary = Rotary(128, {"rope_theta": 1e6, "rope_type": "default"}, 64, "cuda")
        self.at = torch.arange(rows, device="cuda", dtype=torch.int32)
        self.positions = self.at % 64
        self.k, self.v = (_random(rows, 4, 128) for _ in range(2))

    def __call__(self, qkv: Tensor) -> Tensor:
        return fused.rotate_and_write(
            qkv.unflatten(-1, (-1, 128)), self.norms, self.rotary, self.positions, self.k, self.v, self.at
        )


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
