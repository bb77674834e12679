"""Checkpoints as released: block-quantised FP8, layers that are not served, tensors nobody asks for."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.dist.cases import Case, check_close, engine
from tests.dist.families import gemma3, make_case, randomize, score
from tests.dist.forced import forced_logits
from tests.dist.ranks import run_ranks
from toolkit.config.model import ModelConfig
from toolkit.config.parallel import ParallelConfig
from toolkit.engine.dims import ParallelDims
from toolkit.engine.parallel import Groups
from toolkit.engine.weights import SafetensorsWeights, Shard

BLOCK = 128
PROMPT, LENGTH = 8, 12


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3 values and the scale of each 128 x 128 block, smaller ones at the edges; block by block."""
    rows, columns = weight.shape
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scales[i, j] = weight[part].abs().max() / 448
            values[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return values.float() * spread[: values.shape[0], : values.shape[1]]


def write_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}}


@pytest.mark.parametrize(
    "shard", [None, Shard(0, 1, 4), Shard(0, 3, 4), Shard(1, 0, 3), Shard(1, 2, 3), Shard(1, 1, 2), Shard(0, 1, 2)]
)
@pytest.mark.parametrize("shape", [(300, 390), (128, 384), (256, 258)])
def test_a_slice_of_an_fp8_matrix_is_that_slice_dequantized(
    tmp_path: Path, shape: tuple[int, int], shard: Shard | None
) -> None:
    """Ragged edges, and shards that begin inside a block."""
    values, scales = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    save_file({"w": values, "w_scale_inv": scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(FP8))
    if shard is not None and shape[shard.dim] % shard.count:
        shard = None
    weights = SafetensorsWeights(tmp_path, torch.float32, "cpu")
    whole = dequantize(values, scales)
    expected = whole if shard is None else whole.movedim(shard.dim, 0)[shard.of(shape[shard.dim])].movedim(0, shard.dim)
    torch.testing.assert_close(weights.get("w", shape, shard), expected, rtol=0, atol=0)
    stored = weights.get_quantized("w", shape, shard)
    assert stored.weight_NK.dtype == torch.float8_e4m3fn and stored.weight_NK.shape == expected.shape
    assert stored.scales.numel() <= scales.numel()


def test_fp8_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    values, scales = quantize(torch.randn(130, 130))
    save_file({"w": values, "v": values.clone(), "v_scale_inv": scales[:1]}, tmp_path / "model.safetensors")
    weights = SafetensorsWeights(tmp_path, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"config\.json lacks quantization_config\.weight_block_size.*give the"):
        weights.get("w", (130, 130))
    (tmp_path / "config.json").write_text(json.dumps(FP8))
    with pytest.raises(ValueError, match=r"lacks the tensor w_scale_inv \[2, 2\]"):
        weights.get("w", (130, 130))
    with pytest.raises(ValueError, match=r"v_scale_inv in .* has shape \[1, 2\], but config\.json says \[2, 2\]"):
        weights.get("v", (130, 130))


def deepseek_v3() -> torch.nn.Module:
    """Wide enough for several blocks; nothing a multiple of 128 but the vocabulary."""
    config = transformers.DeepseekV3Config(
        vocab_size=128, hidden_size=160, intermediate_size=320, moe_intermediate_size=144, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
        topk_group=1, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=136, kv_lora_rank=144,
        qk_nope_head_dim=40, qk_rope_head_dim=8, v_head_dim=44, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


@pytest.fixture(scope="module")
def fp8_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A DeepSeek-V3 checkpoint as released: FP8 projections and experts, the rest as it was, and an MTP layer."""
    folder = tmp_path_factory.mktemp("fp8")
    oracle = deepseek_v3().float().eval()
    randomize(oracle)
    oracle.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    stored, seen = {}, {}
    for name, tensor in tensors.items():
        stored[name] = seen[name] = tensor
        if name.endswith("proj.weight") or name.endswith("proj_with_mqa.weight"):
            stored[name], stored[f"{name}_scale_inv"] = quantize(tensor)
            seen[name] = dequantize(stored[name], stored[f"{name}_scale_inv"])
    assert sum(t.dtype == torch.float8_e4m3fn for t in stored.values()) == 2 * 5 + 3 + 3 + 8 * 3
    stored["model.layers.2.eh_proj.weight"] = torch.zeros(160, 320)
    stored["model.layers.2.mlp.experts.0.gate_proj.weight"] = torch.zeros(1)
    save_file(stored, folder / "model.safetensors")
    write_config(folder, num_nextn_predict_layers=1, **FP8)
    plain = folder / "dequantized"
    plain.mkdir()
    oracle.config.save_pretrained(plain)
    save_file(seen, plain / "model.safetensors", metadata={"format": "pt"})
    again = transformers.DeepseekV3ForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    return Case(ModelConfig(path=str(folder), dtype="float32"), *score(again, LENGTH, 3))


def test_an_fp8_checkpoint_on_one_rank(fp8_case: Case, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with torch.inference_mode():
        found = forced_logits(Groups.single(), fp8_case.model, engine(), fp8_case.sequences, PROMPT)
    for i, rows in found.items():
        check_close(rows, fp8_case.expected[i], PROMPT)
    (note,) = [r for r in caplog.records if "skipped" in r.message]
    assert "skipped 2 tensors model.layers.2.*: multi-token prediction" in note.message
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("parallel", [ParallelConfig(4, 1, 1), ParallelConfig(4, 2, 2, enable_dp_attention=True)])
def test_an_fp8_checkpoint_split_inside_its_blocks(fp8_case: Case, parallel: ParallelConfig) -> None:
    options = engine(moe_a2a_backend="allgather")
    ranks = run_ranks(ParallelDims.of(parallel), forced_logits, fp8_case.model, options, fp8_case.sequences, PROMPT)
    for logits in ranks:
        for i, rows in logits.items():
            check_close(rows, fp8_case.expected[i], PROMPT)


def test_tensors_that_nothing_asks_for_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = make_case("mixtral", tmp_path, LENGTH, 2)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {f"model.layers.{i}.self_attn.q_proj.bias": torch.zeros(32) for i in range(2)}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    forced_logits(Groups.single(), case.model, engine(), case.sequences, PROMPT)
    (warning,) = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert "2 tensors belong to nothing this model computes" in warning and "layers.0.self_attn.q_proj.bias" in warning


@pytest.mark.parametrize("style", ["released", "transformers 5"])
def test_the_text_of_a_multimodal_gemma(tmp_path: Path, caplog: pytest.LogCaptureFixture, style: str) -> None:
    """Both names that the text model has in a multimodal folder; the image encoder is left out with a note."""
    caplog.set_level(logging.INFO)
    text = gemma3().float().eval()
    randomize(text)
    text.save_pretrained(tmp_path)
    prefix = "language_model.model." if style == "released" else "model.language_model."
    tensors = {
        name.replace("model.", prefix, 1): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(tensors | {"vision_tower.patch.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    sequences, expected = score(text, LENGTH, 2)
    model = ModelConfig(path=str(tmp_path), dtype="float32")
    with torch.inference_mode():
        found = forced_logits(Groups.single(), model, engine(), sequences, PROMPT)
    for i, rows in found.items():
        check_close(rows, expected[i], PROMPT)
    assert ["skipped 1 tensors vision_tower.*: images" in r.message for r in caplog.records].count(True) == 1
    assert np.abs(expected).max() > 1  # the comparison is not of zeros
