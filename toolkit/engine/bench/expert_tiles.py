"""Which tiles the experts' kernels for few rows should have on this GPU: ``SIZES`` of ``moe/triton_gemm.py``.

    python -m toolkit.engine.bench.expert_tiles [--rows 32 128 256] [--ranks 4] [--out FILE]

Times both products alone with every size of tile that fits into a multiprocessor, then pairs of the best ones, for
even and for uneven slots. Tiles are (rows, weights, columns, stages, warps). Shapes are Qwen3-30B-A3B's: of one GPU of
``--ranks``, each of which has ``--rows``. A minute for each number of rows; most of it compiles.
Read next: ``kernels.py``, which times what was chosen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from toolkit.engine import device as devices
from toolkit.engine.bench.kernels import Call, expert_layers, expert_rows, time_us
from toolkit.engine.moe.dispatch import Dispatched
from toolkit.engine.moe.gemm import ExpertWeights
from toolkit.engine.moe.triton_gemm import slots_of

if TYPE_CHECKING:
    from toolkit.engine.kernels.experts import Tiles

SHARED = 225_000  # bytes of a multiprocessor's memory for the stages in flight
BEST = 3  # of each product, that are paired

Product = Callable[[int, Dispatched], Tensor]
"""One of the products, or both, of rows with the weights of a layer."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128, 256], help="of a decode step, of each GPU")
    parser.add_argument("--ranks", type=int, default=4, help="GPUs that the experts are spread over")
    parser.add_argument("--out", type=Path, help="JSON file with every timing")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU on this machine: these kernels run nowhere else")
    devices.use("cuda", 0)
    layers = expert_layers(args.ranks)
    found = []
    for rows in args.rows:
        even, uneven = (expert_rows(rows, args.ranks, even) for even in (True, False))
        for entry in sweep(even, uneven, layers):
            found.append({"rows": rows, "ranks": args.ranks, **entry})
            if args.out:
                args.out.write_text(json.dumps(found, indent=1))
    return 0


def sweep(even: Dispatched, uneven: Dispatched, layers: list[ExpertWeights]) -> Iterator[dict[str, object]]:
    """Every timing in microseconds, as it comes; the best are printed."""
    hidden = replace(even, x=even.x.new_ones(len(even.x), layers[0].down.shape[2]))
    best: list[list[Tiles]] = []
    for what, make, rows in (("gate_up", _gate_up, even), ("down", _down, hidden)):
        times: list[tuple[float, Tiles]] = []
        for tiles in candidates(even.expected, what):
            us = time_us(_of(make(layers, tiles), rows))
            times.append((us[0], tiles))
            yield {"what": what, "tiles": asdict(tiles), "us": us}
        times.sort(key=lambda entry: entry[0])
        best.append([tiles for _, tiles in times[:BEST]])
        for median, tiles in times[: 2 * BEST]:
            _show(even, what, median, tiles)
    for up, down in itertools.product(*best):
        first, second = _gate_up(layers, up), _down(layers, down)

        def both(i: int, rows: Dispatched, first: Product = first, second: Product = second) -> Tensor:
            return second(i, replace(rows, x=first(i, rows)))

        for name, rows in (("even", even), ("uneven", uneven)):
            us = time_us(_of(both, rows))
            yield {"what": f"both, {name}", "tiles": [asdict(up), asdict(down)], "us": us}
            _show(even, name, us[0], up, down)


def candidates(expected: int, what: str) -> Iterator[Tiles]:
    """Tiles whose stages fit; of rows, the power of two that holds what is expected, and the next."""
    from toolkit.engine.kernels.experts import Tiles

    height = max(16, 1 << (expected - 1).bit_length())
    matrices = 2 if what == "gate_up" else 1
    for rows, tall, wide, stages, warps in itertools.product(
        sorted({height, min(2 * height, 128)}), (64, 128, 256), (64, 128), (3, 4, 5, 6), (4, 8)
    ):
        bytes_ = stages * 2 * wide * (matrices * tall + rows)
        if 30_000 < bytes_ < SHARED and tall * matrices <= 256 and not (what == "down" and tall == 64 and warps == 8):
            yield Tiles(rows, tall, wide, stages, warps)


def _of(product: Product, rows: Dispatched) -> Call:
    return lambda i: product(i, rows)


def _gate_up(layers: list[ExpertWeights], tiles: Tiles) -> Product:
    from toolkit.engine.kernels import experts as kernels

    weights = [kernels.describe(layer.gate_up, tiles) for layer in layers]
    return lambda i, rows: kernels.gate_up(rows.x, weights[i % len(weights)], None, slots_of(rows), tiles)


def _down(layers: list[ExpertWeights], tiles: Tiles) -> Product:
    from toolkit.engine.kernels import experts as kernels

    weights = [kernels.describe(layer.down, tiles) for layer in layers]
    return lambda i, rows: kernels.down(rows.x, weights[i % len(weights)], slots_of(rows), tiles)


def _show(rows: Dispatched, what: str, us: float, *tiles: Tiles) -> None:
    sizes = "  ".join(str(tuple(asdict(t).values())) for t in tiles)
    sys.stdout.write(f"{rows.expected:4} rows a slot  {what:8} {us:7.2f} us  {sizes}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
