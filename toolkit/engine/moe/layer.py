"""MoELayer: gate -> placement -> dispatch -> experts -> combine, the shared expert beside it.

S: rows of this rank's slice, D: hidden, K: top-k. Every row is owned by one rank, so the layer needs no gather of
its own; ranks without rows take part with none. Read next: ``dispatch.py``, ``all_to_all.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toolkit.config.engine import EngineConfig
from toolkit.engine.arch import Arch, wants_fp8
from toolkit.engine.dims import ParallelDims
from toolkit.engine.eplb.placement import Placement, start_placement
from toolkit.engine.eplb.recorder import Recorder
from toolkit.engine.fp8 import BLOCK, BlockFp8, Matrix, stack_rows
from toolkit.engine.gpu_libraries import has_deep_gemm
from toolkit.engine.late import Late
from toolkit.engine.moe.dispatch import CombinesLate, ExpertShape, StepRows, TokenDispatcher, make_dispatcher
from toolkit.engine.moe.gate import Gate
from toolkit.engine.moe.gemm import ExpertGemm, ExpertWeights, make_gemm
from toolkit.engine.moe.warm_up import warm_up
from toolkit.engine.overlap import Stages
from toolkit.engine.parallel import Groups, TokenLayout
from toolkit.engine.weights import Shard, Weights


@dataclass
class MoEContext:
    """What all MoE layers of a rank share: where experts are, how rows travel, who counts.

    ``recorder`` is set by the worker when counting is on; ``layers`` are those that were made, in order. ``waited`` is
    called where the host has waited for the device within a launch: what was launched before is done.
    """

    engine: EngineConfig
    groups: Groups
    placement: Placement
    dispatcher: TokenDispatcher
    shape: ExpertShape
    device: str
    recorder: Recorder | None = None
    waited: Callable[[], None] | None = None
    layers: list[MoELayer] = field(default_factory=list)

    @classmethod
    def create(cls, arch: Arch, engine: EngineConfig, groups: Groups, device: str, nodes: int = 1) -> MoEContext:
        """The placement that ``engine.init_expert_location`` names, and the dispatcher over the rank's expert group.

        Args:
            nodes: that the ranks of one set of experts are on.
        """
        slots, dims, rank = arch.slots(engine), groups.dims, groups.ep_rank
        experts, ep_size = arch.num_experts, dims.ep_size
        phy2log_LP = start_placement(
            engine.init_expert_location if arch.moe_layers else "trivial", groups.tp_cpu.broadcast_bytes,
            groups.rank == 0, arch.moe_layers, experts, slots, ep_size, arch.expert_groups, nodes,
        )  # fmt: skip
        algorithm = engine.ep_dispatch_algorithm or "static"
        placement = Placement(phy2log_LP, experts, rank, ep_size, device, nodes, algorithm)
        gemm = make_gemm(engine.moe_runner_backend, device)
        shape = ExpertShape(
            slots, rank, ep_size, arch.hidden_size, arch.top_k, gemm.alignment, gemm.decode_alignment,
            max_rows=-(-engine.chunked_prefill_size // dims.attn_tp),
            max_decode_rows=-(-engine.max_running_requests // dims.attn_tp),
            fp8=keeps_fp8(arch, engine, device) and _whole_blocks(arch, dims),
        )  # fmt: skip
        name = engine.moe_a2a_backend if arch.moe_layers else "allgather"  # which has no buffers that nobody would use
        dispatcher = make_dispatcher(name, groups.moe, shape, engine)
        return cls(engine, groups, placement, dispatcher, shape, device)

    def warm_up(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compiles the experts' GEMMs for every shape that a step may have, before the first request.

        Args:
            progress: called with how many shapes are done, of how many.
        """
        if self.layers:  # all have the same shapes
            first, where = self.layers[0], self.groups.rank / self.groups.dims.tp_size
            ranks, masked = self.groups.moe.size, self.dispatcher.masked
            warm_up(first.gemm, first.experts, self.shape, ranks, where, masked, progress)

    def obstacles(self, step: StepRows) -> tuple[str, ...]:
        """Why a CUDA graph cannot hold the experts' part of such a step; empty: it can."""
        found = {
            "the dispatcher waits on the host": not self.dispatcher.capturable(step),
            "ep_dispatch_algorithm looks at ids on the host": not self.placement.capturable,
            "the recorder looks at each pass": self.recorder is not None and self.recorder.passes is not None,
        }
        return tuple(what for what, is_so in found.items() if is_so)

    def step_rows(self, layout: TokenLayout) -> StepRows:
        """Rows of each rank of the expert group in this step."""
        rows = tuple(layout.rows_by_rank[rank] for rank in self.groups.moe.ranks)
        return StepRows(rows, layout.is_extend, layout.padding)


class MoELayer:
    """One mixture-of-experts FFN.

    Args:
        index: which of the model's MoE layers it is, from 0.
        shared: the shared expert, called with the same rows, or None.
    """

    def __init__(
        self,
        context: MoEContext,
        index: int,
        gate: Gate,
        experts: ExpertWeights,
        shared: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.context, self.index, self.gate, self.shared = context, index, gate, shared
        self.experts = experts
        self.gemm: ExpertGemm = make_gemm(context.engine.moe_runner_backend, context.device)
        self.gemm.pack(experts)
        assert len(context.layers) == index, f"MoE layer {index} is made after {len(context.layers)} others"
        context.layers.append(self)

    def stages(self, x_SD: Tensor, layout: TokenLayout) -> Stages[Tensor | Late]:
        """The layer's stages; returns [S, D]."""
        context, dispatcher = self.context, self.context.dispatcher
        ids_SK, weights_SK, slots_SK = self.gate(x_SD, layout.real, context.placement.table(self.index))
        ids_SK[layout.valid :] = -1  # padding is neither sent nor counted
        if slots_SK is None:
            slots_SK = context.placement.to_slots(self.index, ids_SK)
        else:
            slots_SK[layout.valid :] = -1
        if context.recorder is not None:
            context.recorder.selected(self.index, ids_SK, slots_SK)
        yield "selected"
        step = context.step_rows(layout)
        sent = dispatcher.dispatch_start(x_SD, slots_SK, weights_SK, step)
        # the shared expert fills the time in which rows travel: to the experts in decode, back from them in prefill
        shared = self._shared(x_SD) if not layout.is_extend else None
        yield "dispatched"
        rows, handle = dispatcher.dispatch_finish(sent)
        if context.waited is not None and not dispatcher.capturable(step):
            context.waited()
        if context.recorder is not None:
            context.recorder.received(self.index, rows.counts)
        returned = dispatcher.combine_start(self.gemm(rows), handle)
        yield "combining"
        shared = self._shared(x_SD) if layout.is_extend else shared
        if isinstance(dispatcher, CombinesLate) and dispatcher.is_late(returned):
            yield "combined"
            return dispatcher.combine_late(returned, shared)
        out = dispatcher.combine_finish(returned)
        yield "combined"
        return out if shared is None else out + shared

    def slot_tensors(self) -> list[Tensor]:
        """All that makes up an expert, each [e, ...]; experts migrate by writing into them in place."""
        return [part for part in vars(self.experts).values() if isinstance(part, Tensor)]

    def slots_changed(self) -> None:
        """Some slots were overwritten."""
        self.gemm.pack(self.experts)

    def _shared(self, x_SD: Tensor) -> Tensor | None:
        return self.shared(x_SD) if self.shared is not None else None


def load_experts(
    weights: Weights,
    context: MoEContext,
    index: int,
    names: Callable[[int], tuple[str, str, str]],
    hidden: int,
    ffn: int,
) -> ExpertWeights:
    """The experts in this rank's slots of MoE layer ``index``, each split over moe_tp ranks by FFN columns.

    Args:
        names: expert -> checkpoint names of its gate, up and down projections.
    """
    dims = context.groups.dims
    part = dims.moe_tp_rank(context.groups.rank), dims.moe_tp
    read = weights.get_matrix if context.shape.fp8 else weights.get
    gate_up: list[Matrix] = []
    down: list[Matrix] = []
    for expert in context.placement.local_experts(index):
        gate_name, up_name, down_name = names(expert)
        gate = read(gate_name, (ffn, hidden), Shard(0, *part))
        gate_up.append(stack_rows([gate, read(up_name, (ffn, hidden), Shard(0, *part))]))
        down.append(read(down_name, (hidden, ffn), Shard(1, *part)))
    (gate_up_w, gate_up_s), (down_w, down_s) = _stack(gate_up), _stack(down)
    return ExpertWeights(gate_up_w, down_w, gate_up_s, down_s)


def _stack(experts: list[Matrix]) -> tuple[Tensor, Tensor | None]:
    """One tensor of all slots, and one of their scales where they are in FP8."""
    fp8 = [expert for expert in experts if isinstance(expert, BlockFp8)]
    if fp8:
        assert len(fp8) == len(experts), "some experts are in FP8, others are not"
        return torch.stack([e.weight_NK for e in fp8]), torch.stack([e.scales for e in fp8])
    return torch.stack([expert for expert in experts if isinstance(expert, Tensor)]), None


def _whole_blocks(arch: Arch, dims: ParallelDims) -> bool:
    """True when this rank's part of every expert is made of whole blocks."""
    return not arch.hidden_size % BLOCK and not arch.moe_intermediate // dims.moe_tp % BLOCK


def keeps_fp8(arch: Arch, engine: EngineConfig, device: str) -> bool:
    """True when matrices that are stored in FP8 are multiplied in it here; otherwise they are dequantised."""
    return wants_fp8(arch, engine, device) and has_deep_gemm()
