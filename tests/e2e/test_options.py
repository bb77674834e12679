"""Options that change how steps run and must not change what is said: overlap, balance, packing, the LM head."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from tests.e2e.serving import Served, serve

PROMPTS = [[(7 * i + j) % 250 for j in range(5 + 9 * i)] for i in range(10)]
PARALLEL = {"tp_size": 4, "dp_size": 2, "ep_size": 4, "enable_dp_attention": True}
ENGINE = {"max_total_tokens": 512, "max_running_requests": 8, "chunked_prefill_size": 48}


def texts(served: Served) -> list[str]:
    """Greedy answers to all prompts, sent at once."""

    def answer(prompt: list[int]) -> str:
        body: dict[str, Any] = {"model": served.cfg.model.name, "prompt": prompt, "max_tokens": 12, "ignore_eos": True}
        got = requests.post(f"{served.url}/v1/completions", json=body | {"temperature": 0}, timeout=120)
        assert got.status_code == 200, got.text
        return str(got.json()["choices"][0]["text"])

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(answer, PROMPTS))


def test_overlap_balance_and_padding_leave_the_text_alone(tmp_path: Path) -> None:
    with serve(tmp_path / "plain", engine=ENGINE) as served:  # one rank
        plain = texts(served)
    options = {
        "enable_two_batch_overlap": True,
        "attention_dp_config": {"enable_balance": True, "batching_wait_iters": 3, "timeout_iters": 6},
        "dp_padding_mode": "sum_len",
    }
    parallel = PARALLEL | {"enable_dp_lm_head": True}
    with serve(tmp_path / "options", parallel=parallel, engine=ENGINE | options) as served:
        assert texts(served) == plain
