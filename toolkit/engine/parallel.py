"""Groups: the process groups of one rank, and how a step's tokens lie over the ranks.

The only module that makes process groups; ``dims.py`` has the degrees. The residual stream of a DP group is split
over its attention TP ranks by tokens: each rank keeps the rows of its slice, attention gathers them and
reduce-scatters its output. So every rank of the worker owns different tokens, and dispatchers see one case only.
Read next: ``models/mixtral.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.engine.core import StepContext
from toolkit.engine.dims import ParallelDims

FOREVER = timedelta(days=3650)  # gloo cannot do without a number


class Comm:
    """Collectives over one set of ranks. With one rank they return their input."""

    def __init__(self, ranks: list[int], rank: int, group: dist.ProcessGroup | None) -> None:
        assert group is not None or len(ranks) == 1, f"no process group for {ranks}"
        self.ranks, self.size, self.rank, self.group = ranks, len(ranks), ranks.index(rank), group
        self.begun = 0  # collectives, for whoever looks at ranks that wait for each other (pulse.py)

    @classmethod
    def split(cls, world: int, rank: int, size: int, backend: str | None = None) -> Comm:
        """Cuts the default process group into runs of ``size`` ranks; all of its ranks must do so at the same time."""
        mine, group = [rank], None
        for first in range(0, world, size):
            ranks = list(range(first, first + size))
            made = dist.new_group(ranks, backend=backend, timeout=FOREVER) if size > 1 else None
            if rank in ranks:
                mine, group = ranks, made
        return cls(mine, rank, group)

    def all_gather(self, x: Tensor) -> Tensor:
        """[n, ...] on every rank -> [size * n, ...], in rank order."""
        if self.size == 1:
            return x
        self.begun += 1
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        dist.all_gather_single(out, x.contiguous(), group=self.group)
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """[size * n, ...] -> the sum over ranks of this rank's [n, ...]."""
        if self.size == 1:
            return x
        self.begun += 1
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        dist.reduce_scatter_single(out, x.contiguous(), group=self.group)
        return out

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums ``x`` over the ranks, in place."""
        if self.size > 1:
            self.begun += 1
            dist.all_reduce(x, group=self.group)
        return x

    def all_to_all(self, x: Tensor, send: list[int], recv: list[int]) -> tuple[Tensor, dist.Work | None]:
        """Rows to every rank: ``send[r]`` rows go to rank r, ``recv[r]`` come from it. Wait on the work before use."""
        if self.size == 1:
            return x, None
        self.begun += 1
        out = x.new_empty(sum(recv), *x.shape[1:])
        return out, dist.all_to_all_single(out, x.contiguous(), recv, send, group=self.group, async_op=True)

    def exchange(self, sends: Sequence[tuple[Tensor, int]], recvs: Sequence[tuple[Tensor, int]]) -> list[dist.Work]:
        """Starts to send tensors to ranks of this set, and to receive into tensors from them; wait on the works.

        Between two ranks the order of the tensors must be the same on both.
        """
        ops = [dist.P2POp(dist.irecv, t, self.ranks[peer], self.group) for t, peer in recvs]
        ops += [dist.P2POp(dist.isend, t, self.ranks[peer], self.group) for t, peer in sends]
        return dist.batch_isend_irecv(ops) if ops else []

    def broadcast_bytes(self, data: bytes) -> bytes:
        """What the first rank passes, on every rank."""
        if self.size == 1:
            return data
        self.begun += 1
        length = torch.tensor([len(data)])
        dist.broadcast(length, self.ranks[0], group=self.group)
        if not length.item():
            return b""
        buffer = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == 0:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, self.ranks[0], group=self.group)
        return buffer.numpy().tobytes()


@dataclass(frozen=True)
class Groups:
    """The communicators of one rank.

    Attributes:
        attn_tp: ranks that share this rank's DP group.
        attn_tp_cpu: the same for host data.
        moe: ranks that hold one whole set of experts.
        tp: all ranks of the worker.
        tp_cpu: the same for host data (``agree``).
        counts: the same for host data, for the thread that sums expert counts beside the steps.
        experts: as ``moe``, for experts that move while steps run.
    """

    dims: ParallelDims
    rank: int
    attn_tp: Comm
    attn_tp_cpu: Comm
    moe: Comm
    tp: Comm
    tp_cpu: Comm
    counts: Comm
    experts: Comm

    def collectives(self) -> int:
        """How many this rank has begun, in all its groups."""
        return sum(comm.begun for comm in {id(c): c for c in vars(self).values() if isinstance(c, Comm)}.values())

    @classmethod
    def single(cls) -> Groups:
        """One rank, no process group."""
        one = Comm([0], 0, None)
        return cls(ParallelDims(1, 1, 1, 1, None), 0, one, one, one, one, one, one, one)

    @classmethod
    def connect(cls, dims: ParallelDims, rank: int, host: str, port: int, device: str) -> Groups:
        """Joins the worker's ranks at ``host:port`` (rank 0 listens). Blocks until all are there, 10 minutes at most.

        A later collective has no deadline of its own, since an idle rank may rightly wait for hours: a peer's death is
        found by ``peers.py``, a stall by the launcher's watchdog.
        """
        world = dims.tp_size
        if world == 1:
            return cls.single()
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, world, is_master=rank == 0, timeout=timedelta(minutes=10)
        )
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=FOREVER)
        return cls.of(dims, rank, lambda size, backend: Comm.split(world, rank, size, backend))

    @classmethod
    def of(cls, dims: ParallelDims, rank: int, split: Callable[[int, str | None], Comm]) -> Groups:
        """The groups of ``rank``, each made by ``split(size, backend)``, in the same order on all ranks."""
        return cls(
            dims, rank, attn_tp=split(dims.attn_tp, None), attn_tp_cpu=split(dims.attn_tp, "gloo"),
            moe=split(dims.moe_group, None), tp=split(dims.tp_size, None), tp_cpu=split(dims.tp_size, "gloo"),
            counts=split(dims.tp_size, "gloo"), experts=split(dims.moe_group, None),
        )  # fmt: skip

    @property
    def dense(self) -> Comm:
        """Ranks that split a dense FFN."""
        return self.tp if self.dims.dense_tp > 1 else Comm([self.rank], self.rank, None)

    @property
    def head(self) -> Comm:
        """Ranks that split the vocabulary."""
        return self.attn_tp if self.dims.enable_dp_lm_head else self.tp

    @property
    def ep_size(self) -> int:
        return self.dims.ep_size

    @property
    def ep_rank(self) -> int:
        return self.dims.ep_rank(self.rank)


class TokenLayout:
    """How the tokens of one step lie over the ranks.

    T: tokens of this DP group, replicated on its attention TP ranks. S: rows of this rank's slice, ceil(T / attn_tp).

    Args:
        padding: how ranks' rows are laid side by side in gathers; auto: ``choose_padding``.

    Attributes:
        num_tokens: T.
        rows: S.
        valid: leading rows of the slice that are tokens; the rest is padding.
        num_valid: where the step has a fixed shape (a CUDA graph): the group's real tokens, int32 [1] on the device.
        rows_by_rank: S of every rank of the worker.
    """

    def __init__(
        self, ctx: StepContext, groups: Groups, padding: PaddingMode = "auto", num_valid: Tensor | None = None
    ) -> None:
        tp = groups.dims.attn_tp
        self.num_valid = num_valid
        self.comm = groups.attn_tp
        self.num_tokens = ctx.dp_tokens[groups.dims.dp_rank(groups.rank)]
        rows_by_dp = [-(-tokens // tp) for tokens in ctx.dp_tokens]
        self.rows_by_rank = tuple(rows_by_dp[groups.dims.dp_rank(rank)] for rank in range(groups.dims.tp_size))
        self.rows = -(-self.num_tokens // tp)
        self.first = self.rows * self.comm.rank
        self.valid = max(0, min(self.rows, self.num_tokens - self.first))
        self.is_extend = ctx.is_extend
        # in a step of fixed shape: from which row of the slice on there is padding, int32 [1]
        self.real = num_valid - self.first if num_valid is not None and self.first else num_valid
        self.padding = choose_padding(rows_by_dp, ctx.is_extend) if padding == "auto" else padding

    def scatter(self, x_T: Tensor) -> Tensor:
        """[T, ...] known to every rank of the group -> this rank's [S, ...], padded with zeros."""
        if self.comm.size == 1:
            return x_T
        mine = x_T[self.first : self.first + self.valid]
        return torch.cat([mine, x_T.new_zeros(self.rows - self.valid, *x_T.shape[1:])])

    def gather(self, x_S: Tensor) -> Tensor:
        """This rank's [S, ...] -> the group's [T, ...]."""
        return self.comm.all_gather(x_S)[: self.num_tokens]

    def reduce_scatter(self, x_T: Tensor) -> Tensor:
        """Partial sums [T, ...] -> this rank's [S, ...] of their sum over the group."""
        if self.comm.size == 1:
            return x_T
        pad = self.rows * self.comm.size - self.num_tokens
        return self.comm.reduce_scatter(torch.cat([x_T, x_T.new_zeros(pad, *x_T.shape[1:])]))


PaddingMode = Literal["auto", "max_len", "sum_len"]


def choose_padding(rows_by_dp: Sequence[int], is_extend: bool) -> PaddingMode:
    """SGLang's rule (DpPaddingMode): sum_len when anybody prefills, or when padding would double the rows."""
    if is_extend and len(rows_by_dp) > 1:
        return "sum_len"
    return "max_len" if 2 * sum(rows_by_dp) >= max(rows_by_dp) * len(rows_by_dp) else "sum_len"


def gather_rows(comm: Comm, x_SD: Tensor, rows: Sequence[int], padding: PaddingMode, fill: int = 0) -> Tensor:
    """The rows of all ranks one after another.

    Args:
        rows: S of each rank of ``comm``.
        padding: max_len: every rank's part is padded with ``fill`` to the longest; sum_len: parts as they are.
    """
    if padding == "max_len":
        pad = x_SD.new_full((max(rows) - len(x_SD), *x_SD.shape[1:]), fill)
        return comm.all_gather(torch.cat([x_SD, pad]))
    everything, work = comm.all_to_all(x_SD.repeat(comm.size, 1), [len(x_SD)] * comm.size, list(rows))
    if work is not None:
        work.wait()
    return everything


def reduce_rows(comm: Comm, partial: Tensor, rows: Sequence[int], padding: PaddingMode) -> Tensor:
    """Partial sums laid out as ``gather_rows`` does -> this rank's [S, D] of their sum over the ranks."""
    if padding == "max_len":
        return comm.reduce_scatter(partial)[: rows[comm.rank]]
    first = sum(rows[: comm.rank])
    return comm.all_reduce(partial)[first : first + rows[comm.rank]]
