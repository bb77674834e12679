"""How many pieces a request's KV is read in, once pools have been busy: ``python -m tests.bench.kv_runs``.

Real block tables of a prefill and a decode rank, without a model: requests of random length are prefilled in chunks,
placed, and generate beside others until they end. Adjacent blocks that lie adjacent on both sides are one piece
(``layout.pieces``); printed is the number of pieces a block, at first and after thousands of requests, with few and
with many requests at a time.
"""

from __future__ import annotations

import argparse
import random
import statistics

import numpy as np

from toolkit.engine.core import Request, SamplingParams
from toolkit.engine.kv.kinds import LayerKind
from toolkit.engine.kv.layout import _runs
from toolkit.engine.kv.tables import BlockTables

PAGE = 64
CHUNK = 8192  # tokens of a prefill step
PREFILL_BLOCKS, DECODE_BLOCKS = 1024, 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4000)
    options = parser.parse_args()
    print("requests at a time   pieces a block: first 50   last 1000")
    for prefilling, decoding in ((1, 2), (4, 16), (8, 128)):
        found = simulate(options.requests, prefilling, decoding)
        first, last = statistics.mean(found[:50]), statistics.mean(found[-1000:])
        print(f"{prefilling:>4} + {decoding:<4} {first:>30.2f} {last:>11.2f}")


def simulate(count: int, prefilling: int, decoding: int) -> list[float]:
    """Pieces a block of each request."""
    rng = random.Random(0)
    prefill, decode = (
        BlockTables([LayerKind(0, (0,), blocks)], PAGE, False) for blocks in (PREFILL_BLOCKS, DECODE_BLOCKS)
    )
    sources: list[Request] = []
    running: list[tuple[Request, int]] = []
    found = []
    for number in range(count):
        tokens = [0] * rng.randint(200, 4000)
        source, sink = (Request(f"{number}", list(tokens), len(tokens), SamplingParams(), number, False) for _ in "ab")
        while len(sources) >= prefilling:  # whoever reads first lets go first
            prefill.release(sources.pop(rng.randrange(len(sources))))
        assert prefill.admit(source, CHUNK, reserve=0) and prefill.grow(source, len(tokens))
        sources.append(source)
        while len(running) >= decoding:
            generate(decode, running)
        assert decode.place(sink, reserve=0)
        mine, theirs = np.array(sink.blocks[0]), np.array(source.blocks[0])
        found.append(len(_runs(mine, theirs)) / len(mine))
        running.append((sink, len(tokens) + rng.randint(50, 1000)))
    return found


def generate(decode: BlockTables, running: list[tuple[Request, int]]) -> None:
    """Some tokens for everybody; who has all leaves."""
    for entry in list(running):
        request, end = entry
        request.tokens.extend([0] * 16)
        assert decode.grow(request, len(request.tokens))
        if len(request.tokens) >= end:
            decode.release(request)
            running.remove(entry)


if __name__ == "__main__":
    main()
