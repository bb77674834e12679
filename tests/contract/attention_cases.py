"""The contract of every AttentionBackend, on any device: equal to a float32 loop over requests.

Requests of mixed length, blocks in any order, windows, chunks that continue, decode and prefill in one step; the step
of fixed shape that graphs capture; latent attention. Run by ``test_attention.py`` here and in ``tests/gpu``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.engine.attention.backend import AttentionBackend, make_attention
from toolkit.engine.core import Batch, Request, SamplingParams, ScheduledRequest
from toolkit.engine.kv.kinds import LayerKind, first_token
from toolkit.engine.kv.pool import KVCache, KVSpec, to_fp8
from toolkit.engine.staging import StaticInts

Part = list[tuple[int, int]]
"""Tokens computed and tokens of this step, of each request."""

DECODE: Part = [(1, 1), (37, 1), (600, 1), (255, 1), (256, 1)]
PREFILL: Part = [(0, 1), (0, 300), (40, 70), (513, 33)]
STEPS: dict[str, tuple[Part, Part]] = {
    "decode": (DECODE, []),
    "prefill": ([], PREFILL),
    "mixed": (DECODE, PREFILL),
    "one": ([(9, 1)], []),
}


@dataclass
class Given:
    """A cache with a past, and a step over it."""

    cache: KVCache
    batch: Batch
    past: list[tuple[Tensor, Tensor]]  # of each request and kind, keys and values of all its tokens, float32
    k: Tensor
    v: Tensor | None


def given(
    step: str | tuple[Part, Part],
    spec: KVSpec,
    page: int,
    dtype: torch.dtype,
    device: str,
    window: int = 0,
    seed: int = 0,
    fp8: bool = False,
) -> Given:
    """Two layers of equal window; random keys and values; blocks dealt at random.

    Args:
        step: one of ``STEPS``, or what decodes and what prefills.
        fp8: of the cache; keys are then numbers that it holds.
    """
    rng = random.Random(seed)
    generator = torch.Generator(device).manual_seed(seed)
    parts = STEPS[step] if isinstance(step, str) else step
    lengths = [sum(r) for part in parts for r in part]
    num_blocks = sum(-(-n // page) for n in lengths) + 3
    free = list(range(num_blocks))
    rng.shuffle(free)
    cache = KVCache(spec, [LayerKind(window, (0, 1), num_blocks)], page, dtype, device, fp8=fp8)
    past: list[tuple[Tensor, Tensor]] = []
    new_k, new_v, scheduled = [], [], []
    for part in parts:
        scheduled.append([])
        for computed, count in part:
            total = computed + count
            table = [free.pop() for _ in range(-(-total // page))]
            k = torch.randn(total, spec.heads, spec.k_dim, generator=generator, device=device).to(dtype)
            v = torch.randn(total, spec.heads, max(spec.v_dim, 1), generator=generator, device=device).to(dtype)
            if fp8:
                k = to_fp8(k).to(dtype)
            rows = torch.tensor([table[i // page] * page + i % page for i in range(computed)], device=device).long()
            cache.write(1, rows, k[:computed], v[:computed] if spec.v_dim else None)
            gone = first_token(window, computed) // page if window else 0
            request = Request(str(len(past)), [1] * total, total, SamplingParams(), 0, num_computed=computed)
            request.blocks = [[-1] * gone + table[gone:]]
            scheduled[-1].append(ScheduledRequest(request, count))
            past.append((k, v))
            new_k.append(k[computed:])
            new_v.append(v[computed:])
    batch = Batch(tuple(scheduled[0]), tuple(scheduled[1]))
    return Given(cache, batch, past, torch.cat(new_k), torch.cat(new_v) if spec.v_dim else None)


def expected(g: Given, q: Tensor, scale: float, window: int, v_dim: int) -> Tensor:
    """Request by request, in float32."""
    outs, first = [], 0
    for (k, v), s in zip(g.past, g.batch.scheduled):
        values = v if g.v is not None else k[..., :v_dim]
        n, m = s.num_tokens, s.end
        group = q.shape[1] // k.shape[1]
        keys = k[:m].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("nhd,mhd->hnm", q[first : first + n].float(), keys) * scale
        distance = torch.arange(m - n, m, device=q.device)[:, None] - torch.arange(m, device=q.device)
        seen = (distance >= 0) & (distance < window) if window else distance >= 0
        probs = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hnm,mhd->nhd", probs, values[:m].float().repeat_interleave(group, dim=1)))
        first += n
    return torch.cat(outs)


def check_attends(
    backend: str, step: str, page: int, window: int, dtype: torch.dtype, device: str, dim: int = 128, groups: int = 8
) -> None:
    """Grouped-query attention: what is written is attended, with everything before it."""
    heads = 2
    g = given(step, KVSpec(heads, dim, dim), page, dtype, device, window)
    attention = make_attention(backend, g.cache, device)
    q = torch.randn(len(g.k), heads * groups, dim, device=device).to(dtype)
    plan = attention.plan(g.batch)
    attention.write(g.k, g.v, 1, plan)
    out = attention.forward(q, 1, plan, dim**-0.5)
    close(out, expected(g, q, dim**-0.5, window, dim), dtype)


def check_static_plan(backend: str, page: int, window: int, dtype: torch.dtype, device: str) -> None:
    """A decode step padded to a fixed shape, its numbers filled in later, attends the same."""
    dim, heads, size, max_len = 128, 2, 8, 1024
    g = given("decode", KVSpec(heads, dim, dim), page, dtype, device, window)
    attention = make_attention(backend, g.cache, device)
    views = StaticInts(attention.static_shapes(size, max_len), device)
    plan = attention.static_plan(size, max_len, views.views)
    views.fill(attention.static_arrays(g.batch, size, max_len))
    n = len(g.k)
    pad = size - n
    q = torch.randn(n, heads * 4, dim, device=device).to(dtype)
    before = g.cache.k[1].clone()
    attention.write(torch.cat([g.k, g.k[:pad]]), torch.cat([g.v, g.v[:pad]]), 1, plan)  # type: ignore[list-item,index]
    out = attention.forward(torch.cat([q, q[:pad]]), 1, plan, dim**-0.5)
    close(out[:n], expected(g, q, dim**-0.5, window, dim), dtype)
    assert torch.isfinite(out.float()).all(), "padding must stay finite"
    changed = (g.cache.k[1] != before).flatten(1).any(1).nonzero().flatten()
    own = set(plan.layers[1].rows_T[:n].tolist())
    spare = range(g.cache.num_blocks * page, (g.cache.num_blocks + 1) * page)
    assert set(changed.tolist()) <= own | set(spare), "padding was written into somebody's block"


def check_latent(
    backend: str, step: str, page: int, dtype: torch.dtype, device: str, heads: int, dims: tuple[int, int],
    fp8: bool = False,
) -> None:  # fmt: skip
    """MLA: absorbed decode over the cache, prefill over gathered and expanded keys."""
    latent, rope = dims
    g = given(step, KVSpec(1, latent + rope, 0), page, dtype, device, fp8=fp8)
    attention = make_attention(backend, g.cache, device)
    plan = attention.plan(g.batch)
    attention.write(g.k, None, 1, plan)
    kind, scale = plan.layers[1], (latent + rope) ** -0.5
    if kind.decode.q_lens:
        n = kind.decode.num_tokens
        q = torch.randn(n, heads, latent + rope, device=device).to(dtype)
        if fp8:  # as FlashMLA takes it
            q = to_fp8(q).to(dtype)
        out = attention.decode(q, 1, plan, scale, latent)
        part = Given(g.cache, Batch(g.batch.decode), g.past[:n], g.k, None)
        close(out, expected(part, q, scale, 0, latent), dtype, 4e-2 if fp8 and backend == "flash_mla" else None)
    if kind.prefill.q_lens:
        keys = attention.gather(1, kind.prefill)
        past = g.past[len(g.batch.decode) :]
        assert torch.equal(keys, torch.cat([k[: s.end] for (k, _), s in zip(past, g.batch.prefill)]))
        check_ragged(attention, g, kind.prefill, past, heads, dtype, device)


def check_ragged(
    attention: AttentionBackend, g: Given, segment: object, past: list, heads: int, dtype: torch.dtype, device: str
) -> None:
    k_dim, v_dim = 192, 128
    ends = [s.end for s in g.batch.prefill]
    k = torch.randn(sum(ends), heads, k_dim, device=device).to(dtype)
    v = torch.randn(sum(ends), heads, v_dim, device=device).to(dtype)
    q = torch.randn(sum(s.num_tokens for s in g.batch.prefill), heads, k_dim, device=device).to(dtype)
    out = attention.ragged(q, k, v, segment, k_dim**-0.5)  # type: ignore[arg-type]
    given_kv = list(zip(k.split(ends), v.split(ends)))
    part = Given(g.cache, Batch(g.batch.prefill), given_kv, k, v)
    close(out, expected(part, q, k_dim**-0.5, 0, v_dim), dtype)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, tolerance: float | None = None) -> None:
    """``tolerance``: of the relative error; None: of one rounding to ``dtype``."""
    error = (found.float() - wanted).norm() / wanted.norm()
    assert error < (tolerance or (1e-5 if dtype == torch.float32 else 1e-2)), f"relative error {error:.2e}"
