"""Prefill on one GPU, decode on another, the KV cache read between them: the text is that of aggregated serving.

bf16 with whatever kernels ``auto`` chooses. Greedy text of random weights is easily tipped over by a sum in another
order, so what is compared is asked for one request at a time, in steps of equal shapes; requests beside each other must
end well, in the asked length, and leave no block behind.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.e2e.serving import Served, serve
from tests.gpu.needs import needs_gpus, needs_library
from toolkit.records.steps import read_transfers

pytestmark = needs_gpus(2)

ENGINE = {
    "page_size": 64, "max_total_tokens": 16384, "max_running_requests": 16, "chunked_prefill_size": 128,
    "context_length": 512, "moe_a2a_backend": "allgather",
}  # fmt: skip
CLUSTER = {"device": "cuda", "gpus_per_node": 2}
ONE = {"tp_size": 1, "dp_size": 1, "ep_size": 1}
PROMPTS = [[(7 * i + 3 * j) % 250 for j in range(length)] for i, length in enumerate((5, 63, 64, 130, 200, 333))]
TOKENS = 24


def answer(served: Served, prompt: list[int]) -> str:
    body = {"model": served.cfg.model.name, "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True}
    got = requests.post(f"{served.url}/v1/completions", json=body | {"temperature": 0}, timeout=120)
    assert got.status_code == 200, got.text
    assert got.json()["usage"]["completion_tokens"] == TOKENS
    return str(got.json()["choices"][0]["text"])


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """A model's config group, and what it says on one GPU."""
    from tests.gpu.families import FAMILIES

    hf = json.loads(FAMILIES[request.param]().config.to_json_string())
    model = {"name": request.param, "tokenizer": "bytes", "load_format": "dummy", "hf_config": hf}
    folder = tmp_path_factory.mktemp(f"agg-{request.param}") / "run"
    with serve(folder, model=model, engine=ENGINE, cluster=CLUSTER, parallel=ONE) as served:
        yield model, [answer(served, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("backend", ["local", pytest.param("nixl", marks=needs_library("nixl_cu13"))])
def test_the_text_is_that_of_one_gpu(backend: str, family: tuple[dict[str, Any], list[str]], tmp_path: Path) -> None:
    model, expected = family
    deploy = {
        "mode": "disagg", "prefill": {"parallel": ONE}, "decode": {"parallel": ONE},
        "disaggregation_transfer_backend": backend,
    }  # fmt: skip
    with serve(tmp_path / "run", model=model, engine=ENGINE, cluster=CLUSTER, deploy=deploy) as served:
        assert [answer(served, prompt) for prompt in PROMPTS] == expected
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(lambda i: answer(served, PROMPTS[i % len(PROMPTS)]), range(48)))
        deadline = time.monotonic() + 10
        while True:
            ranks = requests.get(f"{served.url}/get_server_info", timeout=10).json()["dp_ranks"]
            if not any(rank["running"] or rank["waiting"] or rank["kv_used_tokens"] for rank in ranks):
                break
            assert time.monotonic() < deadline, f"blocks are left behind: {ranks}"
            time.sleep(0.1)
        assert requests.post(f"{served.url}/flush_cache", timeout=30).status_code == 200  # and the rows of transfers
    transfers = read_transfers(tmp_path / "run")
    assert len(transfers) == len(PROMPTS) + 48 and (transfers["bytes"] > 0).all()
    assert (transfers["hidden_s"] > 0).any(), "chunks are read while later ones are computed"
