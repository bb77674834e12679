"""What cannot be among the options of expert placement, balancing and counting.

No torch, no numpy: part of a plan's checks.
Read next: ``toolkit/config/engine.py``, where the options are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.config.engine import EngineConfig

if TYPE_CHECKING:
    from toolkit.engine.arch import Arch


def check_eplb(engine: EngineConfig, arch: Arch, ep_size: int) -> list[str]:
    """Options of expert placement, balancing and counting that cannot be, or would be ignored."""
    errors: list[str] = []
    mode, threshold = engine.expert_distribution_recorder_mode, engine.eplb_min_rebalancing_utilization_threshold
    if not arch.moe_layers:
        given = {"enable_eplb": engine.enable_eplb, "init_expert_location": engine.init_expert_location != "trivial",
                 "ep_dispatch_algorithm": engine.ep_dispatch_algorithm is not None}  # fmt: skip
        return [
            f"engine.{name} needs experts, but {arch.family} has none: leave it out" for name in given if given[name]
        ]
    if engine.enable_eplb and ep_size == 1:
        errors.append(
            "engine.enable_eplb=true has nothing to balance with parallel.ep_size=1: use ep_size > 1, or "
            "enable_eplb=false"
        )
    if engine.enable_eplb and mode is None:
        errors.append(
            "engine.enable_eplb=true needs counts, but engine.expert_distribution_recorder_mode=null: use stat"
        )
    if mode == "per_token" and engine.enable_two_batch_overlap:
        errors.append(
            "engine.expert_distribution_recorder_mode=per_token cannot tell the halves of "
            "engine.enable_two_batch_overlap=true apart: use per_pass or stat, or no overlap"
        )
    if not 0 < threshold <= 1:
        errors.append(
            f"engine.eplb_min_rebalancing_utilization_threshold={threshold} must be above 0 and at most 1: "
            "use 1 to always look for a better placement"
        )
    if not 0 < engine.eplb_transfer_budget <= 1:
        errors.append(
            f"engine.eplb_transfer_budget={engine.eplb_transfer_budget} is a share of the slots, above 0 and at most "
            "1: use 1 to let a rebalance move everything, or enable_eplb=false to let it move nothing"
        )
    counts = {"eplb_rebalance_num_iterations": engine.eplb_rebalance_num_iterations,
              "eplb_rebalance_layers_per_chunk": engine.eplb_rebalance_layers_per_chunk,
              "expert_distribution_recorder_buffer_size": engine.expert_distribution_recorder_buffer_size}  # fmt: skip
    errors += [f"engine.{name}={n} must be at least 1" for name, n in counts.items() if n is not None and n < 1]
    if engine.eplb_algorithm in ("hierarchical", "spill") and arch.expert_groups == 1:
        errors.append(
            f"engine.eplb_algorithm={engine.eplb_algorithm} keeps groups of experts together, but the gate of "
            f"{arch.family} knows none: use global or auto"
        )
    return errors
