"""How many KV tokens fit into what a GPU has left (``mem_fraction_static``)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.test_released_models import arch_of
from toolkit.config.engine import EngineConfig
from toolkit.engine.dims import ParallelDims
from toolkit.engine.memory import memory_by_kind
from toolkit.engine.prepare import most_tokens

ONE = ParallelDims(1, 1, 1, 1, None)
TOKEN = {"qwen3_30b_a3b": 4 * 256 * 2, "gemma3_27b": 16 * 256 * 2, "deepseek_v3": 576 * 2}


@pytest.mark.parametrize("model", TOKEN)
@pytest.mark.parametrize("room", [2 * 10**9, 30 * 10**9])
def test_the_cache_fills_the_room_to_the_last_block(model: str, room: int) -> None:
    arch, engine = arch_of(model), EngineConfig(page_size=64, max_running_requests=8, chunked_prefill_size=512)

    def size(tokens: int) -> int:
        given = replace(engine, max_total_tokens=tokens)
        return memory_by_kind(arch, ONE, given, "bfloat16", "cuda")["kv_cache"]

    tokens = most_tokens(room, arch, engine, TOKEN[model])
    assert tokens % 64 == 0 and size(tokens) <= room < size(tokens + 64)


def test_where_all_layers_slide_it_holds_every_running_request() -> None:
    arch = replace(arch_of("mixtral_8x7b"), windows=(4096,) * 32)
    engine = EngineConfig(page_size=16, max_running_requests=4, context_length=8192)
    assert most_tokens(30 * 10**9, arch, engine, 8 * 256 * 2) == 4 * 8192


def test_no_room_is_no_tokens() -> None:
    assert most_tokens(0, arch_of("qwen3_30b_a3b"), EngineConfig(), 2048) == 0
    assert most_tokens(-(10**9), arch_of("qwen3_30b_a3b"), EngineConfig(), 2048) == 0
