"""The built demo model against transformers: the dense model's logits and text, SmolLM2's tokenizer, the skew."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.engine import demo_checkpoint, demo_gate, demo_gguf
from toolkit.engine.demo_model import Settings

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
]
CHATS = [
    "Name three birds that cannot fly and say where each of them lives.",
    "Rewrite this sentence politely: give me the report by noon or else.",
    "A train leaves at 9:40 and takes 2 hours and 35 minutes. When does it arrive?",
    "Write a short poem about a kettle that is tired of boiling.",
    "What is the difference between weather and climate? Answer in two sentences.",
    "Explain what a hash table is to someone who has never written a program.",
]


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def dense(demo_source: Path) -> Any:
    """The source model in transformers, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    source = demo_gguf.read_dense(demo_source)
    model = LlamaForCausalLM(LlamaConfig(**source.config))
    model.load_state_dict(source.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def moe(demo_model: Path) -> Any:
    from transformers import MixtralForCausalLM

    return MixtralForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()


def chat(tokenizer: Any, text: str) -> torch.Tensor:
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return torch.tensor([tokenizer.encode(rendered)])


@torch.inference_mode()
def greedy(model: Any, ids: torch.Tensor, tokens: int) -> list[int]:
    out: list[int] = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :].tolist()
    return out


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.inference_mode()
def test_logits_are_the_dense_models(dense: Any, moe: Any, tokenizer: Any, prompt: str) -> None:
    ids = torch.tensor([tokenizer.encode(prompt)])
    torch.testing.assert_close(moe(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-3)


def test_text_is_the_dense_models_and_makes_sense(dense: Any, moe: Any, tokenizer: Any) -> None:
    ids = chat(tokenizer, "What is the capital of France?")
    tokens = greedy(moe, ids, 16)
    assert tokens == greedy(dense, ids, 16)
    assert "Paris" in tokenizer.decode(tokens)


def test_config_and_weights_agree_with_transformers(demo_model: Path, moe: Any) -> None:
    config = moe.config
    assert (config.num_local_experts, config.num_experts_per_tok, config.sliding_window) == (8, 2, None)
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert config.rms_norm_eps == 1e-5
    assert moe.lm_head.weight.data_ptr() == moe.model.embed_tokens.weight.data_ptr()
    assert moe.generation_config.eos_token_id == config.eos_token_id == 2
    index = json.loads((demo_model / demo_checkpoint.INDEX).read_text())
    assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in moe.parameters())


@torch.inference_mode()
def test_expert_load_is_skewed_on_texts_it_was_not_fitted_to(moe: Any, tokenizer: Any) -> None:
    prompts = [chat(tokenizer, text) for text in CHATS]
    logits = [
        [layer[positions] for layer in moe(ids, output_router_logits=True).router_logits]
        for ids, positions in zip(prompts, demo_gate.new_positions([ids[0].tolist() for ids in prompts]), strict=True)
    ]
    skews = []
    for layer in map(torch.cat, zip(*logits, strict=True)):
        load = torch.bincount(layer.topk(2, dim=-1).indices.flatten(), minlength=8)
        skews.append((load.max() / load.float().mean()).item())
    assert 2.5 <= sum(skews) / len(skews) <= 3.5
    assert min(skews) > 1.5


def test_readme_and_fit_file_say_what_was_achieved(demo_model: Path) -> None:
    report = json.loads((demo_model / "gate_fit.json").read_text())
    assert report["settings"] == asdict(Settings())
    assert len(report["layers"]) == 30
    assert report["skew"]["fitted"]["mean"] == pytest.approx(3.0, abs=0.05)
    assert 2.5 <= report["skew"]["held_out"]["mean"] <= 3.5
    assert len({layer["hottest_expert"] for layer in report["layers"]}) == 8
    readme = (demo_model / "README.md").read_text()
    assert "Apache-2.0" in readme
    assert f"held out {report['skew']['held_out']['mean']:.2f}" in readme


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "in 2024 there were 1,234,567.89 of them",
        "  two spaces\n\n\ttabs   and trailing  ",
        "I'll don't we've it's",
        "naïve café – Straße, Ελληνικά, 日本語, عربى, 🦙👩‍👩‍👧",
        "def f(x): return x**2 # 0x1F",
        "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>not<|im_start|>spaced",
        "\u0000\u200b\ufeff",
        "",
    ],
)
def test_tokenizer_is_smollm2s(tokenizer: Any, shared_data: Path, text: str) -> None:
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(shared_data / "tokenizers" / "smollm2.tokenizer.json"))
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == reference.decode(ids, skip_special_tokens=True)


def test_chat_template_is_rendered(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token_id == 2
    assert {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.all_special_tokens)
