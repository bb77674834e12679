"""The dispatcher seam: tokens to the ranks that hold their experts, and results back.

S: rows of this rank's slice, D: hidden, K: top-k, R: received rows, e: slots of this rank, M: rows a slot at most.
Dispatchers speak physical slots; which expert a slot holds is ``eplb/placement.py``'s business.
The halves (start, finish) are where two-batch overlap interleaves. Read next: ``place.py``, ``all_to_all.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from toolkit.config.engine import EngineConfig
from toolkit.engine.late import Late
from toolkit.engine.parallel import Comm, PaddingMode
from toolkit.registry import Registry


@dataclass(frozen=True)
class StepRows:
    """What all ranks of the group know of a step before its dispatches.

    Attributes:
        rows: rows of each rank's slice, [ranks].
        is_extend: True when any rank prefills.
        padding: how rows are laid side by side where they are gathered.
    """

    rows: tuple[int, ...]
    is_extend: bool
    padding: PaddingMode = "max_len"


@dataclass(frozen=True)
class Dispatched:
    """Rows for this rank's experts. Counts stay where ``x`` is: on a GPU nobody may wait for them.

    Attributes:
        x: contiguous: [R, D], slot-major; slot s owns the ``counts[s]`` rows before ``ends[s]`` (rows between are
            padding). masked: [e, M, D]; slot s owns the first ``counts[s]`` rows of x[s]; M is a multiple
            of the GEMM's alignment, as it may store whole tiles.
        scales: quantisation scales of ``x``, or None.
        counts: real rows of each slot, [e].
        ends: contiguous: the row after the last of each slot, [e]; the next slot begins at the next multiple of
            ``alignment`` (DeepGEMM calls this psum). masked: ``counts``.
        weights: contiguous: [R], by which the experts must scale their results; None: the dispatcher does so.
        expected: about how many rows a slot has, at least 1; GEMMs choose their tiles by it.
    """

    layout: Literal["contiguous", "masked"]
    x: Tensor
    scales: Tensor | None
    counts: Tensor
    ends: Tensor
    weights: Tensor | None
    alignment: int
    expected: int

    @property
    def starts(self) -> Tensor:
        """First row of each slot, [e]."""
        return self.ends - self.counts


class TokenDispatcher(Protocol):
    """One instance carries one batch at a time through its four calls; the handles are its own.

    Attributes:
        masked: some steps bring their rows in the masked layout.
    """

    masked: bool

    def capturable(self, step: StepRows) -> bool:
        """True when neither half of this step's dispatch waits on the host: a CUDA graph can hold it."""
        ...

    def dispatch_start(self, x_SD: Tensor, slot_ids_SK: Tensor, weights_SK: Tensor, step: StepRows) -> Any:
        """Sends each row to the ranks of its slots. Slot -1 goes nowhere. Every rank must call, rows or not."""
        ...

    def dispatch_finish(self, handle: Any) -> tuple[Dispatched, Any]:
        """Waits for the rows; also returns the handle that ``combine_start`` needs."""
        ...

    def combine_start(self, y: Tensor, handle: Any) -> Any:
        """``y`` in the layout of ``Dispatched.x``: sends each row, times its weight, back to its token."""
        ...

    def combine_finish(self, handle: Any) -> Tensor:
        """[S, D]: each token's weighted sum over its experts; zeros where it had none."""
        ...


@runtime_checkable
class CombinesLate(Protocol):
    """A dispatcher whose last kernel can go on to what follows the experts."""

    def is_late(self, handle: Any) -> bool:
        """Whether ``combine_late`` may take the place of ``combine_finish`` in this step."""
        ...

    def combine_late(self, handle: Any, shared: Tensor | None) -> Late:
        """What ``combine_finish`` returns, plus ``shared`` [S, D]."""
        ...


@dataclass(frozen=True)
class ExpertShape:
    """What a dispatcher is made for.

    Attributes:
        num_slots: physical experts of a layer; slot s is on EP rank s // (num_slots / ep_size).
        alignment, decode_alignment: rows at which slots start in the contiguous layout, in steps with and without
            prefill.
        max_rows, max_decode_rows: largest slice of a rank in any step, and in one without prefill.
        fp8: experts multiply in FP8, so rows may travel in it.
    """

    num_slots: int
    ep_rank: int
    ep_size: int
    hidden: int
    top_k: int
    alignment: int = 1
    decode_alignment: int = 1
    max_rows: int = 0
    max_decode_rows: int = 0
    fp8: bool = False

    @property
    def num_local(self) -> int:
        """Slots of this rank."""
        return self.num_slots // self.ep_size

    def align(self, step: StepRows) -> int:
        return self.alignment if step.is_extend else self.decode_alignment


class DispatcherFactory(Protocol):
    def __call__(self, comm: Comm, shape: ExpertShape, engine: EngineConfig) -> TokenDispatcher: ...


DISPATCHERS: Registry[DispatcherFactory] = Registry("engine.moe_a2a_backend")


def make_dispatcher(name: str, comm: Comm, shape: ExpertShape, engine: EngineConfig) -> TokenDispatcher:
    """The dispatcher called ``name`` over ``comm``, the ranks that hold one whole set of experts."""
    from toolkit.engine.moe import all_to_all, allgather, deepep, nvlink  # noqa: F401  (register themselves)

    return DISPATCHERS[name](comm, shape, engine)


def pack_rows(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """One byte row of each token's activation, ids (int32) and weights (float32), so that one collective moves all."""
    parts = (x, ids.to(torch.int32), weights.to(torch.float32))
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def unpack_rows(rows: Tensor, dtype: torch.dtype, hidden: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of ``pack_rows``: x [n, hidden], ids int64 [n, top_k], weights float32 [n, top_k]."""
    x, ids, weights = rows.split([hidden * dtype.itemsize, 4 * top_k, 4 * top_k], dim=1)
    return (
        x.contiguous().view(dtype),
        ids.contiguous().view(torch.int32).long(),
        weights.contiguous().view(torch.float32),
    )
