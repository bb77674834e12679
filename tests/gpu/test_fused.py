"""The Triton kernels of a layer against the torch they replace, bit for bit where both round alike."""

from __future__ import annotations

import pytest
import torch

from toolkit.engine import fused
from toolkit.engine.late import Late, late_linear
from toolkit.engine.layers import RMSNorm, Rotary
from toolkit.engine.moe.gate import GroupedSigmoidGate, SoftmaxGate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

DEVICE, BF16 = "cuda:0", torch.bfloat16


class Given:
    """Weights of one name."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.tensor = (1 + 0.1 * torch.randn(size)).to(DEVICE, dtype)

    def get(self, name: str, shape: tuple[int, ...], shard: object = None, dtype: object = None) -> torch.Tensor:
        return self.tensor


def norm(size: int, dtype: torch.dtype, add_one: bool) -> RMSNorm:
    return RMSNorm(Given(size, dtype), "norm", size, 1e-6, add_one)  # type: ignore[arg-type]


def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "supported", lambda x: False)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """One rounding apart at most; where a rotation cancels two large values, one rounding of those."""
    dtype = wanted.dtype
    rtol, atol = (1.6e-2, 4e-3) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)
    assert (found.float() - wanted.float()).norm() <= (
        2e-3 if dtype == torch.bfloat16 else 1e-6
    ) * wanted.float().norm()


@pytest.mark.parametrize("size", [16, 2048, 7168])
@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("add_one", [False, True])
def test_norms(size: int, rows: int, dtype: torch.dtype, add_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    n = norm(size, dtype, add_one)
    x, delta = (torch.randn(rows, size + 8, device=DEVICE, dtype=dtype)[:, :size] for _ in range(2))
    alone, (total, added) = n(x), n.add(x, delta)
    reference(monkeypatch)
    wanted_total, wanted = n.add(x, delta)
    close(alone, n(x))
    assert torch.equal(total, wanted_total)
    close(added, wanted)


@pytest.mark.parametrize(("hidden", "wide"), [(2048, 4096), (256, 1024), (2880, 4096)])
@pytest.mark.parametrize("rows", [1, 32, 64])
def test_a_product_in_parts_goes_on_to_the_norm(hidden: int, wide: int, rows: int) -> None:
    n, (x, residual) = norm(hidden, BF16, False), (torch.randn(rows, size, device=DEVICE) for size in (wide, hidden))
    weight = (torch.randn(hidden, wide, device=DEVICE) / wide**0.5).to(BF16)
    late = late_linear(x.to(BF16), weight)
    assert isinstance(late, Late)
    wanted = (x.to(BF16).float() @ weight.float().T).to(BF16)  # a library may add up its own parts in bf16
    close(late.alone(), wanted)
    one_rounding = wanted.float().abs() / 128  # of the product, which is larger than a sum that it cancels in
    for found, expected in zip(n.add(residual.to(BF16), late), n.add(residual.to(BF16), wanted)):
        off = (found.float() - expected.float()).abs()
        close(torch.where(off <= one_rounding, expected, found), expected)
        assert float((off > 0).float().mean()) < 0.01
    assert torch.is_tensor(late_linear(x.to(BF16).repeat(65, 1), weight))


@pytest.mark.parametrize("dim", [12, 64, 128])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (32, 4), (3, 1), (24, 8)])
def test_rotate_and_write(dim: int, normed: bool, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    tokens = 19
    rotary = Rotary(dim, {"rope_theta": 1e4, "rope_type": "default"}, 512, DEVICE)
    norms = (norm(dim, dtype, False), norm(dim, dtype, False)) if normed else None
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, device=DEVICE, dtype=dtype)
    positions = torch.randint(512, (tokens,), device=DEVICE, dtype=torch.int32)
    rows = torch.randperm(64, device=DEVICE)[:tokens].int()
    k_cache, v_cache = (torch.zeros(64, kv_heads, dim, device=DEVICE, dtype=dtype) for _ in range(2))
    found = fused.rotate_and_write(qkv, norms, rotary, positions, k_cache, v_cache, rows)
    q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        q, k = (n_(part.contiguous()) for n_, part in zip(norms, (q, k)))
    close(found, rotary(q, positions))
    close(k_cache[rows.long()], rotary(k, positions))
    assert torch.equal(v_cache[rows.long()], v)
    others = torch.ones(64, dtype=torch.bool, device=DEVICE).index_fill_(0, rows.long(), False)
    assert not k_cache[others].any() and not v_cache[others].any()


@pytest.mark.parametrize(("experts", "top_k"), [(16, 4), (128, 8), (160, 6)])
@pytest.mark.parametrize("rows", [0, 1, 70])
@pytest.mark.parametrize("renormalize", [False, True])
def test_softmax_topk(experts: int, top_k: int, rows: int, renormalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = SoftmaxGate(torch.randn(experts, 64, device=DEVICE), top_k, renormalize)
    x, real = torch.randn(rows, 64, device=DEVICE), torch.tensor([60], dtype=torch.int32, device=DEVICE)
    table = torch.cat([torch.randperm(experts, device=DEVICE), torch.tensor([-1], device=DEVICE)])
    (ids, weights, _), (padded, _, slots) = gate(x), gate(x, real, table)
    assert slots is not None and torch.equal(slots, table[padded])
    reference(monkeypatch)
    wanted_ids, wanted, _ = gate(x)
    assert torch.equal(ids, wanted_ids) and torch.equal(padded, gate(x, real)[0])
    assert bool((padded[60:] == -1).all())
    torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("experts", "top_k", "hidden"), [(128, 8, 2048), (8, 2, 4096), (60, 4, 7168)])
@pytest.mark.parametrize("rows", [1, 33, 130, 700])
def test_route_of_few_rows(
    experts: int, top_k: int, hidden: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The product in parts rounds where the whole does, but adds in another order: near ties may go either way."""
    weight = torch.randn(experts, hidden, device=DEVICE, dtype=torch.bfloat16) / hidden**0.5
    gate, x = SoftmaxGate(weight, top_k, False), torch.randn(rows, hidden, device=DEVICE, dtype=torch.bfloat16)
    ids, weights, _ = gate(x)
    reference(monkeypatch)
    wanted_ids, wanted, _ = gate(x)
    torch.testing.assert_close(weights, wanted, rtol=3e-2, atol=1e-5)
    assert bool((ids.sort(-1).values == wanted_ids.sort(-1).values).float().mean() > 0.97)
    assert all(len(set(row)) == top_k for row in ids.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 33, 700])
def test_route_by_groups(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3's shape. Scores are summed in another order in bf16: near ties may go either way."""
    experts, hidden, top_k = 256, 7168, 8
    weight, bias = torch.randn(experts, hidden, device=DEVICE) / hidden**0.5, 0.1 * torch.randn(experts, device=DEVICE)
    gate = GroupedSigmoidGate(weight.to(dtype), bias, top_k, 8, 4, renormalize=True, scale=2.5)
    x, real = (
        torch.randn(rows, hidden, device=DEVICE, dtype=dtype),
        torch.tensor([20], dtype=torch.int32, device=DEVICE),
    )
    table = torch.cat([torch.randperm(experts, device=DEVICE), torch.tensor([-1], device=DEVICE)])
    ids, weights, slots = gate(x, real, table)
    assert slots is not None and torch.equal(slots, table[ids])
    reference(monkeypatch)
    wanted = gate(x, real)
    assert torch.equal(ids[20:], wanted.ids_SK[20:])
    same = (ids == wanted.ids_SK).all(-1)
    assert rows == 0 or bool(same.float().mean() > 0.95)
    torch.testing.assert_close(weights[same], wanted.weights_SK[same], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (300, 8)], ids=str)
def test_lookup(shape: tuple[int, int]) -> None:
    table = torch.randperm(129, device=DEVICE)
    ids = torch.randint(-1, 128, shape, device=DEVICE)
    assert torch.equal(fused.lookup(table, ids), table[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 19])
def test_latent_attention(dtype: torch.dtype, tokens: int) -> None:
    latent, rope, heads, nope = 512, 64, 20, 128
    rotary = Rotary(rope, {"rope_theta": 1e4, "rope_type": "default"}, 512, DEVICE, interleaved=True)
    n = norm(latent, dtype, False)
    positions = torch.randint(512, (tokens,), device=DEVICE, dtype=torch.int32)
    kv = torch.randn(tokens, latent + rope, device=DEVICE, dtype=dtype)
    rows = torch.randperm(64, device=DEVICE)[:tokens].int()
    cache = torch.zeros(64, 1, latent + rope, device=DEVICE, dtype=dtype)
    fused.write_latent(kv, n, rotary, positions, cache, rows)
    wanted = torch.cat([n(kv[:, :latent].contiguous()), rotary(kv[:, None, latent:], positions)[:, 0]], dim=-1)
    close(cache[rows.long(), 0], wanted)
    cache_fp8 = torch.zeros(cache.shape, dtype=torch.float8_e4m3fn, device=DEVICE)
    fused.write_latent(1000 * kv, n, rotary, positions, cache_fp8, rows)  # the norm takes it out, the rest is cut off
    wanted_rope = rotary(1000 * kv[:, None, latent:], positions)[:, 0].clamp(-448, 448)
    torch.testing.assert_close(
        cache_fp8.float()[rows.long(), 0],
        torch.cat([wanted[:, :latent], wanted_rope], -1).float(),
        rtol=7e-2,
        atol=2e-3,
    )
    q = torch.randn(tokens, heads, nope + rope, device=DEVICE, dtype=dtype)
    wanted = torch.cat([q[..., :nope], rotary(q[..., nope:], positions)], dim=-1)
    fused.rotate_pairs(q[..., nope:], rotary, positions)
    close(q, wanted)
