"""The least time a step can take on one GPU: bytes it must read and arithmetic it must do, over measured rates.

Each weight that is used is read once, each cached token of each request once; activations and communication are left
out. Experts that no token chose are not read: with R rows of top-k K over E experts a share 1 - (1 - K / E)^R is.
The larger of the two times is the floor. Knows shapes only. No torch but for ``measure``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from toolkit.config.engine import EngineConfig
from toolkit.engine.arch import Arch
from toolkit.engine.dims import ParallelDims
from toolkit.engine.memory import DTYPE_BYTES, kv_value_bytes, memory_by_kind


@dataclass(frozen=True)
class Rates:
    """What the device was measured to do: bytes a second read + written, multiply-add operations (2 each) a second."""

    bytes_s: float
    flops_s: float


@dataclass(frozen=True)
class Floor:
    """Bytes and operations of one step on one rank."""

    num_bytes: float
    flops: float

    def seconds(self, rates: Rates) -> float:
        return max(self.num_bytes / rates.bytes_s, self.flops / rates.flops_s)


@dataclass(frozen=True)
class Roofline:
    """Floors of the steps of one model under one mapping."""

    arch: Arch
    dims: ParallelDims
    engine: EngineConfig
    dtype: str
    device: str = "cpu"

    def decode(self, requests: int, context: float) -> Floor:
        """One token of ``requests`` a DP rank, each after ``context`` tokens."""
        return self._step(requests, requests, context, logit_rows=requests, cached=requests * context)

    def prefill(self, tokens: int, length: int) -> Floor:
        """``tokens`` a DP rank, of prompts of ``length`` from their begin."""
        return self._step(tokens, tokens, length / 2, logit_rows=tokens / length, cached=tokens)

    def _step(self, tokens: float, queries: float, context: float, logit_rows: float, cached: float) -> Floor:
        arch, dims = self.arch, self.dims
        size = DTYPE_BYTES[self.dtype]
        memory = memory_by_kind(arch, dims, self.engine, self.dtype, self.device)
        values = {kind: n / size for kind, n in memory_by_kind(arch, dims, self.engine, self.dtype).items()}
        rows = tokens * dims.dp_size / dims.moe_dp_size  # rows that meet in one set of experts
        used = 1 - (1 - arch.top_k / arch.num_experts) ** rows if arch.moe_layers else 0.0
        head = size * arch.vocab_size * arch.hidden_size / dims.head_tp
        kv = (
            kv_value_bytes(self.engine, self.dtype)
            * arch.num_layers
            * arch.kv_values
            * arch.kv_heads
            / (1 if arch.mla else min(dims.attn_tp, arch.kv_heads))
        )
        read = memory["attention"] + memory["dense_ffn"] + memory["shared_experts"] + memory["experts"] * used
        expert = 3 * arch.hidden_size * arch.moe_intermediate
        a_rank = tokens * dims.dp_size / dims.tp_size  # tokens of each rank's share of attention-parallel work
        flops = 2 * tokens * values["attention"]
        flops += 2 * a_rank * len(arch.moe_layers) * (arch.top_k * expert)
        flops += 2 * a_rank * values["shared_experts"]
        flops += 2 * tokens * dims.dp_size * values["dense_ffn"]
        flops += 2 * logit_rows * head / size * (dims.dp_size if dims.head_tp > dims.attn_tp else 1)
        per_pair = 2 * arch.kv_values * arch.num_heads / dims.attn_tp  # scores and values of one query and key
        flops += queries * context * per_pair * arch.num_layers
        return Floor(read + head + kv * cached, flops)


def measure(device: str, fp8: bool) -> Rates:
    """Copy bandwidth and matrix rate of the device, each the best of a few runs on random data.

    Args:
        fp8: the model's matrices are multiplied in FP8.
    """
    import torch

    cpu = device == "cpu"
    dtype, rows, size = (torch.float32, 1 << 22, 512) if cpu else (torch.bfloat16, 1 << 30, 8192)
    source = torch.rand(rows, device=device, dtype=torch.float32).to(dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def product() -> object:
        return a @ b

    def product_fp8() -> object:
        return torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    if fp8:
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T, torch.ones((), device=device)

    bytes_s = 2 * source.nbytes / _best(lambda: target.copy_(source), device)
    return Rates(bytes_s, 2 * size**3 / _best(product_fp8 if fp8 else product, device))


def _best(run: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of six runs."""
    import torch

    times = []
    for _ in range(6):
        if device != "cpu":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)
