"""Paged attention backends against each other on one GPU: the choice behind ``attention_backend=auto``.

    python -m toolkit.engine.bench.attention [--out FILE]

Decode is timed as a captured plan in a CUDA graph over many layers' caches, so that no cache is read from L2; prefill
as it is launched. Rates count each cached byte once, and the arithmetic of the causal half. Medians over repeats, with
the spread. A backend that is not installed or refuses the shape is listed with what it says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from toolkit.engine import device as devices
from toolkit.engine.attention.backend import AttentionBackend, make_attention
from toolkit.engine.attention.fa3 import Fa3Attention
from toolkit.engine.core import Batch, Request, SamplingParams, ScheduledRequest
from toolkit.engine.kv.kinds import LayerKind
from toolkit.engine.kv.pool import KVCache, KVSpec
from toolkit.engine.staging import StaticInts

LAYERS = 8
REPEATS = 20


@dataclass(frozen=True)
class Shape:
    """Heads of one rank; ``latent``: MLA of 512 + 64 values."""

    name: str
    heads: int
    kv_heads: int
    latent: bool = False


QWEN = Shape("32/4 heads x 128", 32, 4)
MLA = Shape("MLA, 128 heads", 128, 1, latent=True)
EVERY_LAYER, MERGED, WHOLE = "fa3-schedule-every-layer", "fa3-merged", "fa3-whole"
FA3: dict[str, dict[str, Any]] = {EVERY_LAYER: {"schedule_once": False}, MERGED: {"splits": 0}, WHOLE: {"splits": 1}}
BACKENDS = {
    QWEN: [*((name, 64) for name in ("fa3", *FA3)), *(("fa3", page) for page in (16, 128, 256)), ("varlen", 256)],
    MLA: [("flash_mla", 64), ("fa3", 64)],
}
DECODES = [(32, 1088), (128, 1088), (256, 1088), (64, 4096)]
PREFILLS = [(16, 1024), (2, 8192)]


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
    error: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="", help="JSON file with every row")
    names = ", ".join(("fa3", *FA3, "varlen", "flash_mla"))
    parser.add_argument("--backends", nargs="*", default=[], help=f"only these: {names}; default: all")
    args = parser.parse_args()
    device = devices.use("cuda", 0)
    rows: list[Row] = []
    for shape, backends in BACKENDS.items():
        for backend, page in backends:
            if args.backends and backend not in args.backends:
                continue
            for requests, length in DECODES:
                rows.append(_row(backend, page, shape, "decode", requests, length, device))
            for requests, length in [] if shape.latent else PREFILLS:
                rows.append(_row(backend, page, shape, "prefill", requests, length, device))
            torch.cuda.empty_cache()
    for r in rows:
        rate = f"{r.us:8.1f} us ({r.us_low:.1f}-{r.us_high:.1f})  {r.tb_s:5.2f} TB/s  {r.tflops:6.1f} TFLOP/s"
        what = f"{r.backend:10} page {r.page:<4} {r.shape:18} {r.phase:8} {r.requests:4} x {r.length:<5}"
        sys.stdout.write(f"{what} {r.error or rate}\n")
    if args.out:
        Path(args.out).write_text(json.dumps([asdict(r) for r in rows], indent=1))
    return 0


def _row(backend: str, page: int, shape: Shape, phase: str, requests: int, length: int, device: str) -> Row:
    row = Row(backend, page, shape.name, phase, requests, length)
    try:
        times = _times(backend, page, shape, phase, requests, length, device)
    except Exception as error:
        traceback.print_exc()
        row.error = f"{type(error).__name__}: {str(error)[:200]}"
        return row
    ordered = sorted(times)
    row.us, row.us_low, row.us_high = statistics.median(times), ordered[1], ordered[-2]
    values = 576 if shape.latent else 2 * 128 * shape.kv_heads
    row.tb_s = requests * length * values * 2 / row.us / 1e6
    per_pair = 2 * shape.heads * (576 + 512 if shape.latent else 2 * 128)
    pairs = requests * length if phase == "decode" else requests * length * length / 2
    row.tflops = pairs * per_pair / row.us / 1e6
    return row


def _times(backend: str, page: int, shape: Shape, phase: str, requests: int, length: int, device: str) -> list[float]:
    """Microseconds a layer."""
    blocks = -(-length // page)
    spec = KVSpec(1, 576, 0) if shape.latent else KVSpec(shape.kv_heads, 128, 128)
    kinds = [LayerKind(0, tuple(range(LAYERS)), requests * blocks)]
    cache = KVCache(spec, kinds, page, torch.bfloat16, device)
    for tensor in (*cache.k, *cache.v):
        tensor.normal_()
    attention = make_attention("fa3" if backend in FA3 else backend, cache, device)
    if isinstance(attention, Fa3Attention):
        vars(attention).update(FA3.get(backend, {}))
    order = torch.randperm(requests * blocks).view(requests, blocks).tolist()
    new = 1 if phase == "decode" else length
    scheduled = []
    for i in range(requests):
        request = Request(str(i), [1] * length, length, SamplingParams(), i, num_computed=length - new)
        request.blocks = [order[i]]
        scheduled.append(ScheduledRequest(request, new))
    q = torch.randn(requests * new, shape.heads, spec.k_dim, device=device, dtype=torch.bfloat16)
    if phase == "prefill":
        plan = attention.plan(Batch(prefill=tuple(scheduled)))

        def prefill() -> None:
            for layer in range(LAYERS):
                attention.forward(q, layer, plan, spec.k_dim**-0.5)

        return _measure(prefill)
    return _measure(_decode_graph(attention, Batch(tuple(scheduled)), q, shape, length))


def _decode_graph(
    attention: AttentionBackend, batch: Batch, q: torch.Tensor, shape: Shape, length: int
) -> Callable[[], None]:
    size = len(batch.decode)
    views = StaticInts(attention.static_shapes(size, length), q.device.type)
    plan = attention.static_plan(size, length, views.views)
    views.fill(attention.static_arrays(batch, size, length))
    scale = q.shape[-1] ** -0.5

    def run() -> None:
        for layer in range(LAYERS):
            if shape.latent:
                attention.decode(q, layer, plan, scale, 512)
            else:
                attention.forward(q, layer, plan, scale)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def _measure(run: Callable[[], None]) -> list[float]:
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
