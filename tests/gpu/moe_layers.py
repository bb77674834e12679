"""One MoE layer of a family on GPUs against float32 on a CPU, run on each rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.config.parallel import ParallelConfig
from toolkit.engine.arch import Arch, read_arch
from toolkit.engine.core import StepContext
from toolkit.engine.dims import ParallelDims
from toolkit.engine.fp8 import Matrix, quantize_blocks
from toolkit.engine.late import now
from toolkit.engine.models import deepseek_v3, qwen3_moe
from toolkit.engine.moe.layer import MoEContext, MoELayer
from toolkit.engine.overlap import finish
from toolkit.engine.parallel import Groups, TokenLayout
from toolkit.engine.weights import DummyWeights, Shard

COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 512, "moe_intermediate_size": 256, "num_experts_per_tok": 4, "norm_topk_prob": True,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": COMMON | {
        "model_type": "qwen3_moe", "num_experts": 16, "head_dim": 64, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "deepseek_v3": COMMON | {
        "model_type": "deepseek_v3", "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32, "v_head_dim": 32, "routed_scaling_factor": 2.5, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "moe_layer_freq": 1,
    },
}  # fmt: skip


class FromCpu(DummyWeights):
    """The CPU's dummy weights on the GPU, matrices in FP8 where asked."""

    def get(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        return super().get(name, shape, shard, dtype).cuda()

    def get_matrix(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> Matrix:
        plain = self.get(name, shape, shard)
        return quantize_blocks(plain) if self.keep_fp8 else plain


class Compared:
    """A layer on this rank's GPU, and the same in float32 on the CPU."""

    def __init__(self, groups: Groups, family: str, engine: EngineConfig, fp8: bool) -> None:
        config = FAMILIES[family]
        if fp8:
            config = config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
        arch = read_arch(ModelConfig(hf_config=config, load_format="dummy"))
        self.groups, self.hidden = groups, arch.hidden_size
        cpu = EngineConfig(moe_a2a_backend="allgather", moe_runner_backend="torch")
        alone = MoEContext.create(arch, cpu, Groups.single(), "cpu")
        self.reference = _layer(arch, alone, DummyWeights(0, torch.float32, "cpu"))
        context = MoEContext.create(arch, engine, groups, "cuda")
        self.layer = _layer(arch, context, FromCpu(0, torch.bfloat16, "cpu", keep_fp8=context.shape.fp8))
        assert context.shape.fp8 == fp8
        seen: list[tuple[int, int]] = []
        context.warm_up(lambda done, total: seen.append((done, total)))
        assert [done for done, _ in seen] == list(range(1, len(seen) + 1))

    def error(self, rows: tuple[int, ...], extend: bool) -> float:
        """Relative error of this rank's rows."""
        rank = self.groups.rank
        x = [
            torch.randn(n, self.hidden, generator=torch.Generator().manual_seed(n + 9 * r)) for r, n in enumerate(rows)
        ]
        wanted = _run(self.reference, torch.cat(x), Groups.single(), (sum(rows),), extend).split(rows)[rank]
        found = _run(self.layer, x[rank].to("cuda", torch.bfloat16), self.groups, rows, extend)
        if not rows[rank]:
            return float(found.numel())
        # a row whose experts were a near tie in bf16 may have gone to another: the median row tells the arithmetic
        errors = (found.float().cpu() - wanted).norm(dim=1) / wanted.norm(dim=1)
        return float(errors.median())


def _layer(arch: Arch, context: MoEContext, weights: DummyWeights) -> MoELayer:
    module: Any = {"qwen3_moe": qwen3_moe, "deepseek_v3": deepseek_v3}[arch.family]
    layer: MoELayer = module._moe_layer(weights, "model.layers.1.mlp", arch, context, 0)
    return layer


def _run(layer: MoELayer, x: Tensor, groups: Groups, rows: tuple[int, ...], extend: bool) -> Tensor:
    layout = TokenLayout(StepContext(0, rows, rows, is_extend=extend), groups)
    return now(finish(layer.stages(x, layout)))


def dims(ranks: int) -> ParallelDims:
    return ParallelDims.of(ParallelConfig(ranks, ranks, ranks, enable_dp_attention=True))
