"""FP8 in blocks and groups, and weights that stay in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from toolkit.config.engine import EngineConfig
from toolkit.engine.fp8 import BlockFp8, quantize_blocks, quantize_groups, stack_rows
from toolkit.engine.weights import DummyWeights, SafetensorsWeights, Shard


@pytest.mark.parametrize("shape", [(256, 384), (130, 200), (1, 1)])
def test_blocks_hold_a_matrix_to_half_a_step_of_e4m3(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored = quantize_blocks(weight)
    assert stored.weight_NK.shape == shape and stored.scales.shape == tuple(-(-n // 128) for n in shape)
    largest = stored.scales.max() * 448
    assert bool(((stored.dequantize(torch.float32) - weight).abs() <= weight.abs() / 16 + largest / 448 / 512).all())


def test_blackwells_scales_are_powers_of_two() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    plain, rounded = quantize_blocks(weight), quantize_blocks(weight, power_of_two=True)
    assert bool((rounded.scales.log2() % 1 == 0).all())
    assert bool((rounded.scales >= plain.scales).all()) and bool((rounded.scales < 2 * plain.scales).all())
    error = (rounded.dequantize(torch.float32) - weight).norm() / weight.norm()
    assert float(error) < 0.05


def test_groups_hold_rows_and_zeros_stay_zero() -> None:
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    q, scales = quantize_groups(x)
    assert scales.shape == (3, 5, 2) and bool((q[1].float() == 0).all())
    back = (q.float().unflatten(-1, (-1, 128)) * scales[..., None]).flatten(-2)
    torch.testing.assert_close(back, x, rtol=0.0626, atol=1e-4)


def test_rows_of_matrices_are_stacked_in_either_type() -> None:
    a, b = torch.randn(128, 256), torch.randn(256, 256)
    stacked = stack_rows([quantize_blocks(a), quantize_blocks(b)])
    assert isinstance(stacked, BlockFp8) and stacked.whole
    both = torch.cat([quantize_blocks(m).dequantize(torch.float32) for m in (a, b)])
    torch.testing.assert_close(stacked.dequantize(torch.float32), both)
    torch.testing.assert_close(stack_rows([a, b]), torch.cat([a, b]))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    stored = quantize_blocks(torch.randn(256, 320, generator=torch.Generator().manual_seed(1)))
    odd = quantize_blocks(torch.randn(256, 256, generator=torch.Generator().manual_seed(2)))
    tensors = {
        "odd.weight": stored.weight_NK, "odd.weight_scale_inv": stored.scales,
        "w.weight": odd.weight_NK, "w.weight_scale_inv": odd.scales, "plain.weight": torch.ones(256, 256),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"weight_block_size": [128, 128]}}')
    return tmp_path


@pytest.mark.parametrize("shard", [None, Shard(0, 1, 2), Shard(1, 0, 2)])
def test_whole_blocks_of_a_checkpoint_stay_as_they_are(checkpoint: Path, shard: Shard | None) -> None:
    kept = SafetensorsWeights(checkpoint, torch.bfloat16, "cpu", keep_fp8=True)
    matrix = kept.get_matrix("w.weight", (256, 256), shard)
    assert isinstance(matrix, BlockFp8) and kept.bytes_read == matrix.nbytes
    plain = SafetensorsWeights(checkpoint, torch.bfloat16, "cpu").get_matrix("w.weight", (256, 256), shard)
    assert isinstance(plain, torch.Tensor)
    torch.testing.assert_close(matrix.dequantize(torch.bfloat16), plain)


def test_what_gemms_on_fp8_cannot_use_is_dequantised(checkpoint: Path) -> None:
    kept = SafetensorsWeights(checkpoint, torch.bfloat16, "cpu", keep_fp8=True)
    assert isinstance(kept.get_matrix("odd.weight", (256, 320)), torch.Tensor), "320 columns: a part of a block"
    assert isinstance(kept.get_matrix("w.weight", (256, 256), Shard(0, 1, 4)), torch.Tensor), "begins inside a block"
    assert isinstance(kept.get_matrix("plain.weight", (256, 256)), torch.Tensor), "not stored in FP8"


def test_dummy_weights_in_fp8_are_the_same_model() -> None:
    kept, plain = DummyWeights(0, torch.float32, "cpu", keep_fp8=True), DummyWeights(0, torch.float32, "cpu")
    whole = kept.get_matrix("a.weight", (256, 256))
    assert isinstance(whole, BlockFp8)
    wanted = plain.get("a.weight", (256, 256))
    assert float((whole.dequantize(torch.float32) - wanted).norm() / wanted.norm()) < 0.05
    part = kept.get_matrix("a.weight", (256, 256), Shard(1, 1, 2))
    assert isinstance(part, BlockFp8)
    torch.testing.assert_close(part.dequantize(torch.float32), whole.dequantize(torch.float32)[:, 128:])
    assert isinstance(kept.get_matrix("a.weight", (256, 256), Shard(0, 0, 4)), torch.Tensor)


def test_without_a_gpu_fp8_is_not_kept() -> None:
    from tests.unit.test_experts_check import FP8, arch
    from toolkit.engine.moe.layer import keeps_fp8

    assert arch(FP8).fp8 and not arch().fp8
    assert not keeps_fp8(arch(FP8), EngineConfig(), "cpu")
