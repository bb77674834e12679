"""Setup: the recorder and the manager of one rank, from the configuration.

The only place that knows all of EPLB's parts. Read next: ``recorder.py``, ``manager.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from toolkit.engine.arch import Arch
from toolkit.engine.dims import ParallelDims
from toolkit.engine.eplb.history import History
from toolkit.engine.eplb.manager import Manager
from toolkit.engine.eplb.mover import Mover
from toolkit.engine.eplb.passes import PassLog
from toolkit.engine.eplb.recorder import Recorder
from toolkit.engine.eplb.trigger import Topology, Trigger
from toolkit.engine.moe.layer import MoEContext


def num_nodes(rank_hosts: Sequence[str], dims: ParallelDims) -> int:
    """Nodes that one set of experts is on; 1 where its ranks are not spread over them evenly."""
    hosts = list(rank_hosts[: dims.moe_group])
    nodes = list(dict.fromkeys(hosts))
    each = len(hosts) // len(nodes)
    even = hosts == [host for host in nodes for _ in range(each)] and dims.ep_size % len(nodes) == 0
    return len(nodes) if even else 1


def make_recorder(arch: Arch, moe: MoEContext, experts_path: str, device: str) -> Recorder | None:
    """What ``engine.expert_distribution_recorder_mode`` asks for; None where nothing is counted."""
    mode, placement, groups = moe.engine.expert_distribution_recorder_mode, moe.placement, moe.groups
    if mode is None or not arch.moe_layers:
        return None
    path = Path(experts_path) if experts_path else None
    history = History(
        arch.moe_layers, arch.num_experts, groups.counts, placement.ep_rank, placement.ep_size, placement.phy2log_LP,
        path if groups.rank == 0 else None,
    )  # fmt: skip
    by_pass = mode in ("per_pass", "per_token")
    passes = None
    if by_pass:
        first = placement.ep_rank * placement.num_local
        passes = PassLog(
            groups.rank, len(arch.moe_layers), placement.phy2log_LP.shape[1], first,
            moe.engine.expert_distribution_recorder_buffer_size, mode == "per_token", path,
        )  # fmt: skip
    return Recorder(
        len(arch.moe_layers), placement, groups.dims.moe_tp_rank(groups.rank) == 0,
        1 if by_pass else moe.engine.expert_distribution_recorder_window, history, device, passes,
        by_ids=mode != "stat_approx",
    )  # fmt: skip


def make_manager(arch: Arch, moe: MoEContext, recorder: Recorder | None, folder: Path | None) -> Manager | None:
    """None without ``engine.enable_eplb``.

    Args:
        folder: run folder for the first rank's line a rebalance; None: none.
    """
    engine, placement, groups = moe.engine, moe.placement, moe.groups
    if not engine.enable_eplb or not arch.moe_layers:
        return None
    assert recorder is not None, "enable_eplb without a recorder"
    spare = placement.num_local
    mover = Mover(moe.layers, placement, groups.experts, groups.dims.moe_tp, spare)
    trigger = None
    if groups.rank == 0:
        topology = Topology(placement.ep_size, placement.nodes, arch.expert_groups)
        trigger = Trigger(engine, placement, topology, spare)
    return Manager(mover, recorder, groups.tp_cpu.broadcast_bytes, trigger, folder)
