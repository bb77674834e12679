"""Paged attention on one GPU, the engine's backends and other packages: the choice behind ``attention_backend=auto``.

    python -m toolkit.engine.bench.attention [--backends NAME ...] [--decode 32x1088 ...] [--shapes] [--out FILE]

Decode is timed as a captured plan in a CUDA graph over many layers' caches, so that no cache is read from L2; prefill
as it is launched. What was timed is then compared with float32 on some of its requests. Rates count each cached byte
that is seen once, and the arithmetic of the pairs that are not masked. Medians over repeats, with the spread. What
is not installed, refuses the shape or computes something else is listed with what it says.
Read next: ``peers.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from toolkit.engine import device as devices
from toolkit.engine.attention.backend import AttentionBackend, AttentionPlan, make_attention
from toolkit.engine.attention.fa3 import Fa3Attention
from toolkit.engine.attention.triton_decode import TritonAttention
from toolkit.engine.bench.peers import PEERS, PeerMissing
from toolkit.engine.core import Batch, Request, SamplingParams, ScheduledRequest
from toolkit.engine.kv.kinds import LayerKind
from toolkit.engine.kv.pool import KVCache, KVSpec
from toolkit.engine.staging import StaticInts

LAYERS = 8
REPEATS = 20


@dataclass(frozen=True)
class Shape:
    """Heads of one rank, of 128 values; ``latent``: MLA of 512 + 64. ``window``: tokens that are seen; 0: all."""

    name: str
    heads: int
    kv_heads: int
    latent: bool = False
    window: int = 0

    def seen(self, length: int) -> int:
        """Tokens that the last of ``length`` reads."""
        return min(length, self.window or length)

    def pairs(self, phase: str, length: int) -> float:
        """Of a query and a key, over one request."""
        if phase == "decode":
            return self.seen(length)
        return length * length / 2 - (length - self.seen(length)) ** 2 / 2


QWEN = Shape("32/4 heads x 128", 32, 4)
WINDOW = Shape("32/16 x 128, 1024 seen", 32, 16, window=1024)
MLA = Shape("MLA, 128 heads", 128, 1, latent=True)
EVERY_LAYER = "fa3-schedule-every-layer"
OTHERS = [(name, page) for name, peer in PEERS.items() for page in peer.pages]
BACKENDS = {
    QWEN: [
        *((name, 64) for name in ("triton", "fa3", EVERY_LAYER)),
        *(("fa3", page) for page in (16, 128, 256)),
        ("varlen", 256),
        *OTHERS,
    ],
    WINDOW: [("triton", 64), ("fa3", 64), ("varlen", 256), *OTHERS],
    MLA: [("flash_mla", 64), ("fa3", 64)],
}
DECODES = [(32, 1088), (128, 1088), (256, 1088), (64, 4096)]
SHAPES = [(tile, stages, warps) for tile in (64, 32) for stages in (2, 3, 4) for warps in (1, 2, 4)]
PREFILLS = [(16, 1024), (2, 8192)]
FARTHEST = 0.02  # from float32, relative to its norm: rounding to bf16 gives 0.003
LAST = 64  # queries of a request that are compared


Step = tuple[str, int, int]
"""decode or prefill, requests, tokens of each."""


@dataclass
class Row:
    backend: str
    page: int
    shape: str
    phase: str
    requests: int
    length: int
    us: float = 0.0
    us_low: float = 0.0
    us_high: float = 0.0
    tb_s: float = 0.0
    tflops: float = 0.0
    off: float = 0.0
    """Distance from float32, relative."""
    error: str = ""

    def __str__(self) -> str:
        rate = f"{self.us:8.1f} us ({self.us_low:.1f}-{self.us_high:.1f})  {self.tb_s:5.2f} TB/s"
        what = f"{self.backend:24} page {self.page:<4} {self.shape:22} {self.phase:8}"
        where = f"{self.requests:4} x {self.length:<5}"
        return f"{what} {where} {self.error or f'{rate}  {self.tflops:6.1f} TFLOP/s  off {self.off:.4f}'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="", help="JSON file with every row")
    names = ("triton", "fa3", EVERY_LAYER, "varlen", "flash_mla", *PEERS)
    only = f"only these of {', '.join(names)}; default: all"
    parser.add_argument("--backends", nargs="*", default=names, choices=names, metavar="NAME", help=only)
    sizes = "requests x tokens in the cache, e.g. 64x4096"
    parser.add_argument("--decode", nargs="*", type=_size, default=DECODES, metavar="NxL", help=sizes)
    parser.add_argument("--shapes", action="store_true", help="decode alone, with every shape of triton's programs")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU on this machine: these kernels run nowhere else")
    device = devices.use("cuda", 0)
    todo = [(shape, *what) for shape, backends in BACKENDS.items() for what in backends if what[0] in args.backends]
    if args.shapes:
        todo = [(QWEN, name, 64) for name in ("fa3", "triton", *("triton-{}-{}-{}".format(*s) for s in SHAPES))]
    todo.sort(key=lambda what: what[1] in PEERS)  # last: who breaks the GPU's context breaks nothing of ours
    rows: list[Row] = []
    steps = [("decode", *step) for step in args.decode] + [("prefill", *step) for step in PREFILLS if not args.shapes]
    for row in measured(todo, steps, device):
        rows.append(row)
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
        if args.out:
            Path(args.out).write_text(json.dumps([asdict(r) for r in rows], indent=1))
    return 0


def _size(text: str) -> tuple[int, int]:
    requests, length = map(int, text.split("x"))
    return requests, length


def measured(todo: Sequence[tuple[Shape, str, int]], steps: Sequence[Step], device: str) -> Iterator[Row]:
    """Row by row, each shape, backend and size of pages; one row for a package that is not installed."""
    missing: set[str] = set()
    for shape, backend, page in todo:
        torch.cuda.empty_cache()
        for phase, requests, length in steps:
            if backend in missing or (shape.latent and phase == "prefill"):
                break
            row = Row(backend, page, shape.name, phase, requests, length)
            try:
                _fill(row, shape, device)
            except PeerMissing as error:
                row.error = str(error)
                missing.add(backend)
            except Exception as error:
                traceback.print_exc()
                row.error = f"{type(error).__name__}: {str(error)[:200]}"
            yield row


def _fill(row: Row, shape: Shape, device: str) -> None:
    times, row.off = _times(row, shape, device)
    ordered = sorted(times)
    row.us, row.us_low, row.us_high = statistics.median(times), ordered[1], ordered[-2]
    values = 576 if shape.latent else 2 * 128 * shape.kv_heads
    row.tb_s = row.requests * shape.seen(row.length) * values * 2 / row.us / 1e6
    per_pair = 2 * shape.heads * (576 + 512 if shape.latent else 2 * 128)
    row.tflops = row.requests * shape.pairs(row.phase, row.length) * per_pair / row.us / 1e6


def make(backend: str, cache: KVCache, device: str) -> AttentionBackend:
    if backend in PEERS:
        return PEERS[backend].make(cache, device)
    name, *sizes = backend.split("-")
    attention = make_attention(name, cache, device)
    if isinstance(attention, TritonAttention) and sizes:
        from toolkit.engine.kernels.decode_attention import Shape as Programs

        attention.shape = Programs(*map(int, sizes))
    elif isinstance(attention, Fa3Attention):
        attention.schedule_once = backend != EVERY_LAYER
    return attention


def _times(row: Row, shape: Shape, device: str) -> tuple[list[float], float]:
    """Microseconds a layer; how far the output is from float32."""
    requests, length = row.requests, row.length
    blocks = -(-length // row.page)
    spec = KVSpec(1, 576, 0) if shape.latent else KVSpec(shape.kv_heads, 128, 128)
    kinds = [LayerKind(shape.window, tuple(range(LAYERS)), requests * blocks)]
    cache = KVCache(spec, kinds, row.page, torch.bfloat16, device)
    attention = make(row.backend, cache, device)
    for tensor in (*cache.k, *cache.v):
        tensor.normal_()
    order = torch.randperm(requests * blocks).view(requests, blocks).tolist()
    new = 1 if row.phase == "decode" else length
    scheduled = []
    for i in range(requests):
        request = Request(str(i), [1] * length, length, SamplingParams(), i, num_computed=length - new)
        request.blocks = [order[i]]
        scheduled.append(ScheduledRequest(request, new))
    q = torch.randn(requests * new, shape.heads, spec.k_dim, device=device, dtype=torch.bfloat16)
    if row.phase == "prefill":
        plan = attention.plan(Batch(prefill=tuple(scheduled)))

        def run() -> Tensor:
            return _layers(attention, q, plan, shape)
    else:
        run = _decode_graph(attention, Batch(tuple(scheduled)), q, shape, length)
    times = _measure(run)
    off = distance(run(), q, cache, LAYERS - 1, scheduled, shape)  # of what was timed
    if not off < FARTHEST:
        raise ValueError(f"the output is {off:.3f} from float32 (relative), more than {FARTHEST}")
    return times, off


def _layers(attention: AttentionBackend, q: Tensor, plan: AttentionPlan, shape: Shape) -> Tensor:
    """The last layer's output."""
    scale = q.shape[-1] ** -0.5
    out = q
    for layer in range(LAYERS):
        if shape.latent:
            out = attention.decode(q, layer, plan, scale, 512)
        else:
            out = attention.forward(q, layer, plan, scale)
    return out


def distance(
    out: Tensor, q: Tensor, cache: KVCache, layer: int, scheduled: Sequence[ScheduledRequest], shape: Shape
) -> float:
    """Of the last queries of the first and the last request from attention in float32, relative to its norm."""
    pages, values = cache.pages(layer)
    wrong = whole = 0.0
    for i, s in ((0, scheduled[0]), (len(scheduled) - 1, scheduled[-1])):
        n = min(s.num_tokens, LAST)
        rows = slice((i + 1) * s.num_tokens - n, (i + 1) * s.num_tokens)
        k = pages[s.request.blocks[0]].flatten(0, 1)[: s.end].float()
        v = k[..., :512] if shape.latent else values[s.request.blocks[0]].flatten(0, 1)[: s.end].float()
        query = q[rows].float().unflatten(1, (shape.kv_heads, -1))  # n, kv heads, heads of one, dim
        scores = torch.einsum("nhgd,mhd->nhgm", query, k) * q.shape[-1] ** -0.5
        ago = torch.arange(s.end - n, s.end, device=q.device)[:, None] - torch.arange(s.end, device=q.device)
        unseen = (ago < 0) | (ago >= (shape.window or s.end))
        weights = scores.masked_fill(unseen[:, None, None], -torch.inf).softmax(-1)
        wanted = torch.einsum("nhgm,mhd->nhgd", weights, v).flatten(1, 2)
        wrong += float((out[rows].float() - wanted).square().sum())
        whole += float(wanted.square().sum())
    return math.sqrt(wrong / whole)


def _decode_graph(
    attention: AttentionBackend, batch: Batch, q: Tensor, shape: Shape, length: int
) -> Callable[[], Tensor]:
    """Replays it, and gives the last layer's output."""
    size = len(batch.decode)
    views = StaticInts(attention.static_shapes(size, length), q.device.type)
    views.fill(attention.static_arrays(batch, size, length))
    # one plan each, so that what the first layer works out for all is in the graph, too
    warm, captured = (attention.static_plan(size, length, views.views) for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _layers(attention, q, warm, shape)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = _layers(attention, q, captured, shape)

    def replay(held: object = (views, captured)) -> Tensor:
        graph.replay()  # which reads the plan's arrays: they live as long as this function
        return out

    return replay


def _measure(run: Callable[[], object]) -> list[float]:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / LAYERS)
    return times


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
