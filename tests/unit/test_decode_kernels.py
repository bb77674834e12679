"""The small kernels of a decode step in Triton's interpreter, against torch."""

from __future__ import annotations

import torch

from tests.interpreted import interpret, needs_triton
from toolkit.engine.layers import RMSNorm
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
    parts = linear.partial_products(x, weight)
    assert parts is not None and len(parts) > 1
    wanted = x.float() @ weight.float().T
    torch.testing.assert_close(parts.sum(0), wanted, rtol=1e-3, atol=1e-3)
    norm = RMSNorm(_Weight(hidden), "norm", hidden, 1e-6)  # type: ignore[arg-type]
    total, normed = norms.add_rms_norm(residual, parts, norm.weight, norm.eps, False)
    wanted_total, wanted_norm = norm.add(residual, wanted)
    torch.testing.assert_close(total, wanted_total, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(normed, wanted_norm, rtol=1e-3, atol=1e-3)
    assert linear.partial_products(x[:, :200].contiguous(), weight[:, :200].contiguous()) is None


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


def experts_with_few_rows(rows: int, hidden: int, wide: int) -> None:
    """Both products of uneven slots, in both layouts, by fewer programs than there are tiles."""
    from toolkit.engine.kernels import experts as kernels

    ffn, counts = 128, [rows, 0, 3 * rows, 1, 0]
    gate_up, down = torch.randn(5, 2 * ffn, hidden) / hidden**0.5, torch.randn(5, hidden, ffn) / ffn**0.5
    count, stride = torch.tensor(counts, dtype=torch.int32), 64
    starts = [stride * slot for slot in range(5)]
    ends = torch.tensor([start + n for start, n in zip(starts, counts)], dtype=torch.int32)
    x, by = torch.randn(5 * stride, hidden), torch.rand(5 * stride)
    first, second = kernels.Tiles(16, 64, 128, 3, 4), kernels.Tiles(16, 128, 64, 3, 4)
    for weights, ended in ((by, ends), (None, None)):
        slots = kernels.Slots(count, ended, expected=0)
        given = x if ended is not None else x.view(5, stride, hidden)
        a = kernels.gate_up(given, kernels.describe(gate_up, first), weights, slots, first)
        y = kernels.down(a, kernels.describe(down, second), slots, second).view(len(x), hidden)
        for slot, (start, n) in enumerate(zip(starts, counts)):
            gate, up = (x[start : start + n] @ gate_up[slot].T).chunk(2, -1)
            wanted = torch.nn.functional.silu(gate) * up
            if weights is not None:
                wanted = wanted * weights[start : start + n, None]
            torch.testing.assert_close(y[start : start + n], wanted @ down[slot].T, rtol=1e-3, atol=1e-3)


@needs_triton
def test_experts_with_few_rows() -> None:
    interpret(__name__, "experts_with_few_rows")


@needs_triton
def test_experts_by_groups() -> None:
    interpret(__name__, "experts_by_groups")


@needs_triton
def test_a_product_in_parts_goes_on_to_the_norm() -> None:
    interpret(__name__, "product_then_norm")


@needs_triton
def test_experts_their_slots_and_rows_back() -> None:
    interpret(__name__, "experts_and_slots")


@needs_triton
def test_attention_of_one_token_a_request() -> None:
    interpret("tests.contract.decode_cases", "check")
