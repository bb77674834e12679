"""``health.*``: how a run is watched. Read next: ``launch/preflight.py``, ``launch/watch.py``."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.config.options import opt


@dataclass(frozen=True)
class HealthConfig:
    """How a run is watched."""

    stall_s: float = opt(180.0, "silence that ends a run: no progress in loading, or no step with requests in flight")
    preflight: bool = opt(True, "look at every node before ranks start: GPUs, links, memory, disk, ports, clock")
    min_disk_gb: float = opt(1.0, "preflight: free space that run folder and temporary folder must have, 10^9 bytes")
    max_clock_offset_ms: float = opt(50.0, "preflight: most that a node's clock may differ from the first node's")
    sample_interval_s: float = opt(
        1.0, "seconds between two samples of each node's GPUs, CPUs, memory, network; 0: none"
    )
