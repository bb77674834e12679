"""Memory of a cache with sliding windows W: 2 * heads * dim * size * (global * n + local * min(n, W)) for n tokens."""

from __future__ import annotations

import pytest
import torch

from tests.unit.test_config import compose
from toolkit.config.engine import EngineConfig
from toolkit.engine.arch import read_arch
from toolkit.engine.core import SamplingParams
from toolkit.engine.dims import ParallelDims
from toolkit.engine.kv.kinds import LayerKind, layer_kinds, window_blocks
from toolkit.engine.kv.pool import KVCache, KVSpec
from toolkit.engine.kv.tables import BlockTables
from toolkit.engine.memory import memory_by_kind
from toolkit.engine.scheduler import Scheduler

PAGE, CHUNK, CONTEXT = 16, 2048, 32_768
HEADS, DIM, WINDOW, LOCAL, GLOBAL = 16, 128, 1024, 52, 10  # Gemma 3 27B, bf16
TOKEN = 2 * HEADS * DIM * 2  # bytes a layer
SPEC = KVSpec(HEADS, DIM, DIM)


def formula(n: int) -> int:
    return TOKEN * (GLOBAL * n + LOCAL * min(n, WINDOW))


def options(**changes: object) -> EngineConfig:
    values = {"page_size": PAGE, "max_total_tokens": CONTEXT + PAGE, "max_running_requests": 1}
    return EngineConfig(**(values | {"chunked_prefill_size": CHUNK} | changes))  # type: ignore[arg-type]


def kinds_27b(engine: EngineConfig) -> tuple[LayerKind, ...]:
    return layer_kinds(read_arch(compose("model=gemma3_27b").model).windows, engine)


def held(tables: BlockTables) -> int:
    """Bytes of all blocks that are in use."""
    blocks = [(pool.num_blocks - pool.num_free) * len(kind.layers) for kind, pool in zip(tables.kinds, tables.pools)]
    return sum(blocks) * PAGE * TOKEN


def test_a_context_of_32k_holds_what_the_formula_says() -> None:
    """Through the real scheduler, chunk by chunk, then 100 tokens of decode."""
    tables = BlockTables(kinds_27b(options()), PAGE, prefix_cache=True)
    assert [(kind.window, len(kind.layers)) for kind in tables.kinds] == [(0, GLOBAL), (WINDOW, LOCAL)]
    scheduler = Scheduler(tables, CHUNK, 1, CONTEXT + PAGE)
    scheduler.add("r", list(range(CONTEXT)), SamplingParams(max_tokens=16))
    for chunk in range(1, CONTEXT // CHUNK + 1):
        batch = scheduler.schedule()
        scheduler.finish(batch, [0] * batch.scheduled[0].samples)
        assert held(tables) == formula(chunk * CHUNK)
    assert held(tables) == formula(CONTEXT) == 3_120_562_176
    while not scheduler.idle:
        batch = scheduler.schedule()
        n = batch.scheduled[0].request.num_computed + 1
        blocks_in_use = PAGE * TOKEN * (GLOBAL * -(-n // PAGE) + LOCAL * window_blocks(WINDOW, PAGE))
        assert formula(n) <= held(tables) <= blocks_in_use
        scheduler.finish(batch, [0])


@pytest.mark.parametrize("running", [1, 8])
def test_the_cache_allocates_windows_and_one_step(running: int) -> None:
    """Global layers: every token. Sliding ones: the blocks that ``running`` windows lie in and a step's tokens."""
    engine = options(max_running_requests=running)
    cache = KVCache(SPEC, kinds_27b(engine), PAGE, torch.bfloat16, "meta")
    sliding = running * (WINDOW + 2 * PAGE) + CHUNK
    assert cache.num_bytes == TOKEN * (GLOBAL * (CONTEXT + PAGE) + LOCAL * sliding)
    arch, one_rank = read_arch(compose("model=gemma3_27b").model), ParallelDims(1, 1, 1, 1, None)
    assert memory_by_kind(arch, one_rank, engine, "bfloat16")["kv_cache"] == cache.num_bytes
    everything = TOKEN * (GLOBAL + LOCAL) * (CONTEXT + PAGE)
    assert cache.num_bytes < everything / (4 if running == 1 else 2)


def test_a_share_for_sliding_layers_is_what_they_get() -> None:
    kinds = kinds_27b(options(max_total_tokens=CONTEXT, swa_full_tokens_ratio=0.25))
    assert [kind.num_blocks for kind in kinds] == [CONTEXT // PAGE, CONTEXT // PAGE // 4]


def test_a_cache_takes_the_memory_it_reports() -> None:
    kinds = layer_kinds((6, 0, 6), EngineConfig(page_size=4, max_total_tokens=400, chunked_prefill_size=64))
    cache = KVCache(KVSpec(2, 8, 6), kinds, 4, torch.float32, "cpu")
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*cache.k, *cache.v)}
    assert len(storages) == 4  # keys and values of two kinds
    assert sum(storages.values()) == cache.num_bytes
    assert [len(k) // 4 for k in cache.k] == [kinds[1].num_blocks, kinds[0].num_blocks, kinds[1].num_blocks]


@pytest.mark.parametrize(("window", "most"), [(1, 1), (2, 2), (16, 2), (17, 2), (18, 3), (1024, 65)])
def test_a_window_lies_in_so_many_blocks_at_most(window: int, most: int) -> None:
    by_counting = max((end // PAGE) - ((end - window + 1) // PAGE) + 1 for end in range(window - 1, window + 4 * PAGE))
    assert window_blocks(window, PAGE) == most == by_counting
