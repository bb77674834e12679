"""Disaggregated serving says what aggregated serving says, whatever the mappings of its sides and the way between."""

from __future__ import annotations

import importlib.util
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.e2e.serving import Served, serve, tiny_model
from toolkit.records.steps import read_transfers

# 16 KV heads' worth of grouped queries, and layers that see 40 tokens: heads are cut and windows move on.
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64,
    "max_position_embeddings": 512, "sliding_window": 40, "rms_norm_eps": 1e-5, "rope_theta": 10000,
}  # fmt: skip
ENGINE = {"page_size": 4, "max_total_tokens": 1024, "max_running_requests": 8, "chunked_prefill_size": 48}
PROMPTS = [[(7 * i + 3 * j) % 250 for j in range(3 + 13 * i)] for i in range(9)]
DEP2 = {"tp_size": 2, "dp_size": 2, "ep_size": 2, "enable_dp_attention": True}
TEP2 = {"tp_size": 2, "ep_size": 2}


def answer(served: Served, prompt: list[int], **more: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": served.cfg.model.name, "prompt": prompt, "max_tokens": 10, "ignore_eos": True}
    got = requests.post(f"{served.url}/v1/completions", json=body | {"temperature": 0} | more, timeout=120)
    assert got.status_code == 200, got.text
    body = got.json()
    return {"text": [choice["text"] for choice in body["choices"]], "usage": body["usage"]["completion_tokens"]}


@cache
def aggregated(family: str) -> tuple[list[dict[str, Any]], list[str]]:
    """What one rank that prefills and decodes answers: ``answers``, and the texts of all prompts. Asked once."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(Path(folder) / "run", model=model_of(family), engine=ENGINE) as s,
    ):
        found = answers(s)
    return found, [answer["text"][0] for answer in found[: len(PROMPTS)]]


def model_of(family: str) -> dict[str, Any]:
    return tiny_model() if family == "deepseek" else tiny_model() | {"hf_config": MIXTRAL}


def answers(served: Served) -> list[dict[str, Any]]:
    """To all prompts at once: plain, sampled with penalties, of one token, of three choices."""
    sampled = {"temperature": 0.8, "seed": 5, "frequency_penalty": 0.5, "presence_penalty": 0.3}
    jobs: list[tuple[list[int], dict[str, Any]]] = [(prompt, {}) for prompt in PROMPTS]
    jobs += [(PROMPTS[4], sampled), (PROMPTS[6], {"max_tokens": 1}), (PROMPTS[5], {"n": 3, **sampled})]
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda job: answer(served, job[0], **job[1]), jobs))


CASES = [
    pytest.param("mixtral", "local", "bootstrap", TEP2, DEP2, id="gqa-tp2-to-tp1"),
    pytest.param(
        "deepseek", "nixl", "synchronous", DEP2, TEP2, id="mla-tp1-to-tp2",
        marks=pytest.mark.skipif(not importlib.util.find_spec("nixl_cu13"), reason="needs nixl-cu13"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "backend", "handoff", "prefill", "decode"), CASES)
def test_the_text_is_that_of_aggregated_serving(
    family: str, backend: str, handoff: str, prefill: dict[str, Any], decode: dict[str, Any], tmp_path: Path
) -> None:
    model, (expected, _) = model_of(family), aggregated(family)
    deploy = {
        "mode": "disagg", "prefill": {"parallel": prefill}, "decode": {"parallel": decode},
        "disaggregation_transfer_backend": backend, "disaggregation_handoff": handoff,
    }  # fmt: skip
    with serve(tmp_path / "disagg", model=model, engine=ENGINE, deploy=deploy) as served:
        assert answers(served) == expected
        info = requests.get(f"{served.url}/get_server_info", timeout=10).json()
        assert [worker["pool"] for worker in info["workers"]] == ["prefill", "decode"]
        assert requests.post(f"{served.url}/flush_cache", timeout=30).status_code == 200  # and the rows of transfers
    transfers = read_transfers(tmp_path / "disagg")
    assert len(transfers) == len(PROMPTS) + 1 + 3, "every request but the one of a single token was handed on"
    assert (transfers["bytes"] > 0).all() and (transfers["first_decode_s"] > 0).all()
    assert (transfers["hidden_s"] > 0).any() == (handoff == "bootstrap")
