"""The kernels of the NVLink dispatcher in Triton's interpreter: several ranks in one process, several rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.interpreted import interpret, needs_triton
from toolkit.engine.fp8 import quantize_groups
from toolkit.engine.layers import RMSNorm
from toolkit.engine.moe.place import room_for

# ranks, most rows of each, hidden, top-k, slots of a rank, alignment, FP8 rows
SHAPES = [
    (2, 8, 64, 3, 4, 8, False),
    (3, 3, 200, 4, 3, 1, False),
    (2, 3, 256, 2, 4, 8, True),
    (1, 3, 64, 2, 4, 4, False),
]


def rounds(ranks: int, most: int, hidden: int, top_k: int, e: int, alignment: int, fp8: bool) -> None:
    """Identity experts: each row comes back times the sum of its weights, whoever has how many rows."""
    from toolkit.engine.kernels import nvlink, nvlink_back, signals

    nvlink.PLACERS, signals.ALONE = (3, 2) if alignment > 1 else (128, 64)  # type: ignore[assignment]
    groups = hidden // 128 if fp8 else 0
    rows = ranks * most
    sizes = (rows * hidden * 2, rows * groups * 4, rows * top_k * 4, rows * top_k * 4, rows * hidden * 2, 256 * ranks)
    starts = [sum(-(-size // 128) * 128 for size in sizes[:i]) for i in range(len(sizes) + 1)]
    buffers = [torch.zeros(starts[-1], dtype=torch.uint8) for _ in range(ranks)]
    peers = torch.tensor([b.data_ptr() for b in buffers])
    windows = [
        signals.Window(peers, torch.tensor([1, 0]).int(), torch.zeros(2 * ranks).int(), rank, *starts[:-1])
        for rank in range(ranks)
    ]
    for lengths in ([3] + [0] * (ranks - 1), [min(most, 2 + rank) for rank in range(ranks)]):
        step = max(lengths)
        given = [_given(n, hidden, top_k, ranks * e) for n in lengths]
        placed: list[tuple[Tensor, Tensor]] = []
        for w, (x, ids, weights) in zip(windows, given):
            sent, scales = quantize_groups(x) if fp8 else (x, None)
            nvlink.push(w, sent, None if scales is None else scales.contiguous(), ids, weights, step, e)
        everyone = torch.cat(
            [torch.nn.functional.pad(ids, (0, 0, 0, step - len(ids)), value=-1) for _, ids, _ in given]
        )
        for w in windows:
            like = torch.empty(0, hidden, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16)
            room = room_for(ranks * step, top_k, e, alignment)
            y, scales, at, counts, ends = nvlink.place(w, like, groups, top_k, step, e, alignment, room)
            local = everyone - w.rank * e
            mine = (local >= 0) & (local < e)
            assert counts.tolist() == torch.bincount(local[mine], minlength=e).tolist()
            assert torch.equal(at >= 0, mine) and (ends - counts).remainder(alignment).eq(0).all()
            if scales is not None:
                y = (y.float().unflatten(-1, (-1, 128)) * scales[..., None]).flatten(-2).to(torch.bfloat16)
            placed.append((y, at))
        for w, (y, at) in zip(windows, placed):
            nvlink_back.give_back(w, y, at, step)
        for w, (x, ids, weights) in zip(windows, given):
            found = nvlink_back.total(w, ids, hidden, torch.bfloat16, step, e)
            wanted = x.float() * (weights * (ids >= 0)).sum(-1, keepdim=True)
            torch.testing.assert_close(found.float(), wanted, rtol=8e-2 if fp8 else 2e-2, atol=8e-2 if fp8 else 2e-2)
            if lengths[-1] == 0:
                continue
            more = x.flip(0) if w.rank else None
            norm = RMSNorm(_Weight(hidden), "norm", hidden, 1e-6, add_one=w.rank > 0)  # type: ignore[arg-type]
            sums = nvlink_back.total_norm(w, ids, step, e, more, x, norm)
            for got, expected in zip(sums, norm.add(x, found if more is None else found + more)):
                torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)  # the interpreter cuts bits off


class _Weight:
    def __init__(self, size: int) -> None:
        self.weight = torch.linspace(0.5, 1.5, size).to(torch.bfloat16)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.weight


def _given(rows: int, hidden: int, top_k: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, distinct slots of each (some masked), weights."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.rand(rows, slots, generator=generator).argsort(-1)[:, :top_k].contiguous()
    ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
    x = torch.randn(rows, hidden, generator=generator).to(torch.bfloat16)
    return x, ids, torch.rand(rows, top_k, generator=generator)


@needs_triton
def test_rows_come_back() -> None:
    interpret(__name__, "rounds")
