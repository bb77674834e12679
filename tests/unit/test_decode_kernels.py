"""The small kernels of a decode step in Triton's interpreter, against torch."""

from __future__ import annotations

import torch

from tests.interpreted import interpret, needs_triton
from toolkit.engine.layers import RMSNorm, Rotary
from toolkit.engine.moe.gate import GroupedSigmoidGate

# rows, hidden, wide: of a product with few rows that goes on to a norm
SHAPES = [(1, 256, 512), (19, 512, 1024)]


class _Weight:
    def __init__(self, size: int) -> None:
        self.weight = torch.linspace(0.5, 1.5, size)

    def get(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.weight


def product_then_norm(rows: int, hidden: int, wide: int) -> None:
    from toolkit.engine.kernels import linear, norms

    x, residual = torch.randn(rows, wide), torch.randn(rows, hidden)
    weight = torch.randn(hidden, wide) / wide**0.5
    wanted = x.float() @ weight.float().T
    for early in (True, False):
        parts = linear.partial_products(x, weight, early)
        assert parts is not None and len(parts) > 1
        torch.testing.assert_close(parts.sum(0), wanted, rtol=1e-3, atol=1e-3)
    norm = RMSNorm(_Weight(hidden), "norm", hidden, 1e-6)  # type: ignore[arg-type]
    total, normed = norms.add_rms_norm(residual, parts, norm.weight, norm.eps, False)
    wanted_total, wanted_norm = norm.add(residual, wanted)
    torch.testing.assert_close(total, wanted_total, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(normed, wanted_norm, rtol=1e-3, atol=1e-3)
    assert linear.partial_products(x[:, :200].contiguous(), weight[:, :200].contiguous()) is None


def heads_in_parts(rows: int, hidden: int, wide: int) -> None:
    """Head norms, RoPE and the write into the cache, of a product that comes in parts."""
    from toolkit.engine.kernels import attention

    heads, kv_heads, dim = 4, 2, 16
    parts = torch.randn(3, rows, heads + 2 * kv_heads, dim)
    norms = (RMSNorm(_Weight(dim), "q", dim, 1e-6), RMSNorm(_Weight(dim), "k", dim, 1e-6))  # type: ignore[arg-type]
    rotary = Rotary(dim, {"rope_theta": 1e4, "rope_type": "default"}, 64, "cpu")
    positions, at = torch.randint(64, (rows,), dtype=torch.int32), torch.randperm(32)[:rows].int()
    caches = [[torch.zeros(32, kv_heads, dim) for _ in range(2)] for _ in range(2)]
    found = attention.rotate_and_write(parts, norms, rotary, positions, *caches[0], at)
    wanted = attention.rotate_and_write(parts.sum(0), norms, rotary, positions, *caches[1], at)
    q = rotary(norms[0](parts.sum(0)[:, :heads]), positions)
    for one, other in ((found, wanted), (found, q), *zip(*caches)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@needs_triton
def test_heads_in_parts() -> None:
    interpret(__name__, "heads_in_parts")


def experts_and_slots(rows: int, hidden: int, wide: int) -> None:
    """Top-k with padding, its slots from a table, and rows summed back."""
    from toolkit.engine.kernels import gate
    from toolkit.engine.kernels import rows as kernels

    experts, top_k = 24, 3
    x, weight = torch.randn(rows, hidden), torch.randn(experts, hidden) / hidden**0.5
    real = torch.tensor([max(rows - 2, 1)], dtype=torch.int32)
    table = torch.cat([torch.randperm(experts) + 100, torch.tensor([-1])])
    ids, weights, slots = gate.softmax_route(x, weight, top_k, True, real, table)
    wanted, wanted_ids = (x @ weight.T).softmax(-1).topk(top_k, -1)
    wanted_ids[int(real) :] = -1
    assert torch.equal(ids, wanted_ids)
    assert slots is not None and torch.equal(slots, table[ids])
    torch.testing.assert_close(weights, wanted / wanted.sum(-1, keepdim=True))
    y, at = torch.randn(50, hidden), torch.randint(-1, 50, (rows, top_k))
    found = kernels.gather_rows(y, at, weights, torch.float32)
    torch.testing.assert_close(found, ((at >= 0) * weights)[..., None].mul(y[at]).sum(1), rtol=1e-4, atol=1e-4)


def experts_by_groups(rows: int, hidden: int, wide: int) -> None:
    """DeepSeek's choice; groups and experts that are no powers of two."""
    from toolkit.engine.kernels import gate as kernels

    for experts, groups, best, top_k in ((24, 4, 2, 3), (30, 5, 3, 4)):
        weight, bias = torch.randn(experts, hidden) / hidden**0.5, 0.3 * torch.randn(experts)
        gate = GroupedSigmoidGate(weight, bias, top_k, groups, best, renormalize=top_k == 3, scale=2.5)
        x, real = torch.randn(rows, hidden), torch.tensor([max(rows - 2, 1)], dtype=torch.int32)
        table = torch.cat([torch.randperm(experts) + 100, torch.tensor([-1])])
        ids, weights, slots = kernels.grouped_route(x, gate, real, table)
        wanted = gate(x, real)
        assert torch.equal(ids, wanted.ids_SK)
        assert slots is not None and torch.equal(slots, table[ids])
        torch.testing.assert_close(weights, wanted.weights_SK)


@needs_triton
def test_experts_by_groups() -> None:
    interpret(__name__, "experts_by_groups")


@needs_triton
def test_a_product_in_parts_goes_on_to_the_norm() -> None:
    interpret(__name__, "product_then_norm")


@needs_triton
def test_experts_their_slots_and_rows_back() -> None:
    interpret(__name__, "experts_and_slots")
