"""Building blocks of every family: norm, rotary embedding, gated FFN, embedding and LM head.

T: tokens of the DP group, S: rows of this rank's slice (parallel.TokenLayout), D: hidden, V: vocabulary.
Knows no family. Read next: ``models/mixtral.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.engine import fused
from toolkit.engine.fp8 import BlockFp8, Matrix, stack_rows
from toolkit.engine.gpu_libraries import import_gpu_library
from toolkit.engine.late import Late
from toolkit.engine.parallel import Comm, Groups, TokenLayout, gather_rows, reduce_rows
from toolkit.engine.weights import Shard, Weights


class RMSNorm:
    """x / rms(x) * weight, the quotient computed in float32.

    Args:
        add_one: multiply by 1 + weight instead, in float32 (Gemma).
    """

    def __init__(self, weights: Weights, name: str, size: int, eps: float, add_one: bool = False) -> None:
        self.weight, self.eps = weights.get(f"{name}.weight", (size,)), eps
        if add_one:
            self.weight = self.weight.float() + 1.0
        self.add_one = add_one

    def __call__(self, x: Tensor) -> Tensor:
        if fused.supported(x):
            return fused.rms_norm(x, self)
        normed = F.rms_norm(x.float(), (x.shape[-1],), None, self.eps)
        if self.add_one:
            return (normed * self.weight).to(x.dtype)
        return normed.to(x.dtype) * self.weight

    def add(self, x: Tensor, delta: Tensor | Late) -> tuple[Tensor, Tensor]:
        """(x + delta, the norm of that)."""
        if isinstance(delta, Late):
            return delta.into(x, self)
        if fused.supported(x):
            return fused.add_rms_norm(x, delta, self)
        total = x + delta
        return total, self(total)


class Rotary:
    """Rotary position embedding of ``dim`` values a head.

    Args:
        rope: Hugging Face's rope settings, old or new style (``rope_parameters``); types default, linear, yarn.
        interleaved: pairs are (x0, x1), (x2, x3), ... as in DeepSeek; otherwise (x_i, x_{i + dim/2}).
    """

    def __init__(self, dim: int, rope: dict[str, Any], max_len: int, device: str, interleaved: bool = False) -> None:
        inverse = _inverse_frequencies(dim, rope)
        angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inverse)
        factor = _attention_factor(rope)
        self.cos = (angles.cos() * factor).to(device)
        self.sin = (angles.sin() * factor).to(device)
        self.interleaved = interleaved

    def __call__(self, x: Tensor, positions_T: Tensor) -> Tensor:
        """x [T, heads, dim] rotated by ``positions_T``."""
        cos, sin = self.cos[positions_T][:, None, :], self.sin[positions_T][:, None, :]
        pairs = x.float()
        if self.interleaved:
            a, b = pairs[..., 0::2], pairs[..., 1::2]
            out = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        else:
            a, b = pairs.chunk(2, dim=-1)
            out = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        return out.to(x.dtype)


def rope_settings(hf: dict[str, Any]) -> dict[str, Any]:
    """One dict from either style of config.json: rope_theta + rope_scaling, or rope_parameters."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope.setdefault("rope_theta", hf.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    if rope["rope_type"] not in ("default", "linear", "yarn"):
        raise ValueError(f"rope_type={rope['rope_type']} is not supported: default, linear and yarn are")
    return rope


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention scale: 0.1 * mscale * ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _inverse_frequencies(dim: int, rope: dict[str, Any]) -> Tensor:
    """[dim / 2] float32. YaRN: Peng et al. 2023 (arXiv 2309.00071), as DeepSeek-V3 applies it."""
    theta: float = rope["rope_theta"]
    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    inverse = 1.0 / theta**exponent
    if rope["rope_type"] == "linear":
        return inverse / float(rope["factor"])
    if rope["rope_type"] == "default":
        return inverse

    def corr(rotations: float) -> float:
        length = rope["original_max_position_embeddings"]
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(corr(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(corr(rope.get("beta_slow") or 1)), dim - 1)
    ramp = ((torch.arange(dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    return inverse / float(rope["factor"]) * ramp + inverse * (1 - ramp)


def _attention_factor(rope: dict[str, Any]) -> float:
    if rope["rope_type"] != "yarn":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor = float(rope["factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return yarn_mscale(factor, rope["mscale"]) / yarn_mscale(factor, rope["mscale_all_dim"])
    return yarn_mscale(factor, 1.0)


class DenseFFN:
    """down(activation(gate x) * up x), its columns split over ``comm``. Takes and returns slices [S, D]."""

    def __init__(
        self,
        weights: Weights,
        name: str,
        hidden: int,
        intermediate: int,
        comm: Comm,
        activation: Callable[[Tensor], Tensor] = F.silu,
    ) -> None:
        self.comm, self.activation = comm, activation
        part = Shard(0, comm.rank, comm.size)
        gate = weights.get_matrix(f"{name}.gate_proj.weight", (intermediate, hidden), part)
        up = weights.get_matrix(f"{name}.up_proj.weight", (intermediate, hidden), part)
        self.gate_up = stack_rows([gate, up])
        columns = Shard(1, comm.rank, comm.size)
        self.down = weights.get_matrix(f"{name}.down_proj.weight", (hidden, intermediate), columns)

    def __call__(self, x_SD: Tensor, layout: TokenLayout) -> Tensor:
        if self.comm.size == 1:
            return self.local(x_SD)
        x = gather_rows(self.comm, x_SD, layout.rows_by_rank, layout.padding)
        return reduce_rows(self.comm, self.local(x), layout.rows_by_rank, layout.padding)

    def local(self, x: Tensor) -> Tensor:
        """This rank's columns over the given rows: partial sums when the FFN is split."""
        return glu(x, self.gate_up, self.down, self.activation)


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """x [n, K] times weight [N, K] transposed; x is quantised in groups of 128 where the weight is in FP8."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    from toolkit.engine.kernels import rows

    return _multiply_fp8(rows.quantize(x), weight)


def _multiply_fp8(x: tuple[Tensor, Tensor], weight: BlockFp8) -> Tensor:
    """Quantised rows and their scales times weight [N, K] transposed -> bfloat16."""
    library = import_gpu_library("deep_gemm", "FP8 weights on a GPU")
    out = torch.empty(len(x[0]), len(weight.weight_NK), dtype=torch.bfloat16, device=x[0].device)
    library.fp8_gemm_nt(x, (weight.weight_NK, weight.scales), out)
    return out


def glu(x: Tensor, gate_up: Matrix, down: Matrix, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """[n, D] through one gated FFN: gate_up [2F, D], down [D, F]."""
    hidden = linear(x, gate_up)
    if hidden.is_cuda and hidden.dtype == torch.bfloat16 and activation is F.silu:
        from toolkit.engine.kernels import rows

        if isinstance(down, BlockFp8):
            return _multiply_fp8(rows.swiglu_quantize(hidden, None, None), down)
        return F.linear(rows.swiglu(hidden, None, None), down)
    gate, up = hidden.chunk(2, dim=-1)
    return linear(activation(gate) * up, down)


def swiglu(x: Tensor, gate_up: Matrix, down: Matrix) -> Tensor:
    """[n, D] through one SwiGLU FFN: gate_up [2F, D], down [D, F]."""
    return glu(x, gate_up, down, F.silu)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation (``gelu_pytorch_tanh``)."""
    return F.gelu(x, approximate="tanh")


class Embedding:
    """Token embedding, replicated on every rank."""

    def __init__(self, weights: Weights, name: str, vocab: int, hidden: int) -> None:
        self.weight = weights.get(f"{name}.weight", (vocab, hidden))

    def __call__(self, tokens_T: Tensor) -> Tensor:
        return F.embedding(tokens_T, self.weight)


class LMHead:
    """Vocabulary projection, rows split over ``comm``: the attention TP group, or all ranks of the worker.

    Over all ranks (SGLang without enable_dp_lm_head), the rows of every DP rank meet: each rank multiplies all of
    them with its part of the vocabulary, and sends each DP rank the logits of its own.
    """

    def __init__(self, weight: Tensor, groups: Groups) -> None:
        self.weight, self.groups, self.comm = weight, groups, groups.head

    @classmethod
    def load(
        cls, weights: Weights, name: str, vocab: int, hidden: int, groups: Groups, tied: Embedding | None
    ) -> LMHead:
        """``tied``: the embedding whose rows are used when the checkpoint has no head of its own."""
        part = Shard(0, groups.head.rank, groups.head.size)
        if tied is not None:
            weights.skip(f"{name}.", "the embedding, stored twice")
            return cls(tied.weight[part.of(vocab)], groups)
        return cls(weights.get(f"{name}.weight", (vocab, hidden), part), groups)

    def __call__(self, x_ND: Tensor, dp_rows: tuple[int, ...]) -> Tensor:
        """[N, D], the same on every rank of the DP group -> logits [N, V], as they are multiplied or in float32.

        Args:
            dp_rows: N of each DP rank. Every rank must call when any is not zero.
        """
        if self.comm.size == 1:
            return F.linear(x_ND, self.weight)
        dims = self.groups.dims
        if dims.head_tp == dims.attn_tp:
            return self.comm.all_gather(F.linear(x_ND, self.weight).float().T.contiguous()).T
        rows = [dp_rows[dims.dp_rank(rank)] for rank in self.comm.ranks]
        parts = torch.split(gather_rows(self.comm, x_ND, rows, "sum_len"), rows)
        # each DP rank's rows once, then a copy of the logits to every rank of that group
        own = F.linear(torch.cat([parts[dims.leader(dp)] for dp in range(dims.dp_size)]), self.weight).float()
        by_dp = torch.split(own, list(dp_rows))
        sent = torch.cat([by_dp[dims.dp_rank(rank)] for rank in self.comm.ranks])
        received, work = self.comm.all_to_all(sent, rows, [len(x_ND)] * self.comm.size)
        if work is not None:
            work.wait()
        return received.unflatten(0, (self.comm.size, -1)).transpose(0, 1).flatten(1) if len(x_ND) else received[:0]
