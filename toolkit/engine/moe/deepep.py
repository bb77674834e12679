"""Dispatch and combine by DeepEP: NVLink within a host, RDMA between hosts.

Which of its two ways a step takes is decided from what all ranks have agreed on, so all decide alike: ``normal`` moves
exactly the rows that travel, but the host waits for their number; ``low_latency`` has room for the worst routing,
waits for nothing and can be held by a CUDA graph. Each way has two implementations, V2's ElasticBuffer
(``deepep_elastic.py``) and the older Buffer (``deepep_legacy.py``). Rows travel in FP8 where experts multiply in it.
S: rows of this rank's slice, D: hidden, K: top-k. Knows no GEMM.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from toolkit.config.engine import EngineConfig
from toolkit.engine.gpu_libraries import has_rdma, import_gpu_library
from toolkit.engine.moe.dispatch import DISPATCHERS, Dispatched, ExpertShape, StepRows, TokenDispatcher
from toolkit.engine.parallel import Comm

log = logging.getLogger(__name__)

Way = Literal["normal", "low_latency"]
# what "auto" means; docs/performance.md has the measurements
BEST: dict[Way, str] = {"normal": "v2", "low_latency": "v2"}


@dataclass(frozen=True)
class Settings:
    """What both implementations are made from.

    Attributes:
        most: largest slice of a rank in each way.
        fp8: rows travel in FP8.
        overlap: communication runs beside compute (two-batch overlap), so it should leave it processors.
        rdma: hosts are connected by RDMA.
    """

    shape: ExpertShape
    most: dict[Way, int]
    fp8: bool
    overlap: bool
    rdma: bool


class Transport(Protocol):
    """The four calls of ``TokenDispatcher``, each way by name.

    Attributes:
        num_bytes: of the buffers on this GPU.
        masked: the low-latency way brings rows in the masked layout.
    """

    num_bytes: int
    masked: bool

    def dispatch_start(self, way: Way, x: Tensor, slots: Tensor, weights: Tensor, step: StepRows) -> Any: ...
    def dispatch_finish(self, handle: Any) -> tuple[Dispatched, Any]: ...
    def combine_start(self, y: Tensor, handle: Any) -> Any: ...
    def combine_finish(self, handle: Any) -> Tensor: ...

    def library_calls(
        self, way: Way, x: Tensor, slots: Tensor, weights: Tensor, step: StepRows
    ) -> Callable[[], object]:
        """The library's dispatch and combine with these rows and nothing around them, for measurements."""
        ...


@DISPATCHERS.register("deepep")
def make_deepep(comm: Comm, shape: ExpertShape, engine: EngineConfig) -> TokenDispatcher:
    """Raises ``ValueError`` when the library is missing."""
    library = import_gpu_library("deep_ep", "engine.moe_a2a_backend=deepep")
    assert comm.size == shape.ep_size, f"deepep needs whole experts: {comm.size} ranks, {shape}"
    assert comm.group is not None, "deepep over one rank without a process group"
    comm.all_reduce(torch.zeros(1, device="cuda"))  # NCCL connects its ranks at first use; the library relies on it
    normal_most = shape.max_rows if engine.deepep_mode != "low_latency" else 0
    most: dict[Way, int] = {"normal": normal_most, "low_latency": low_latency_rows(engine, shape)}
    fp8 = shape.fp8 if engine.deepep_dispatch_dtype == "auto" else engine.deepep_dispatch_dtype == "fp8"
    settings = Settings(shape, most, fp8, engine.enable_two_batch_overlap, has_rdma())
    ways: tuple[Way, ...] = ("normal", "low_latency") if engine.deepep_mode == "auto" else (engine.deepep_mode,)
    chosen = {way: BEST[way] if engine.deepep_buffer == "auto" else engine.deepep_buffer for way in ways}
    made = {name: _make(name, library, comm, settings, chosen) for name in sorted(set(chosen.values()))}
    log.info(
        "DeepEP over %d ranks: %s; rows in %s; %s RDMA; %.0f MB of buffers",
        comm.size, ", ".join(f"{way} by {chosen[way]}, {most[way]} rows a rank at most" for way in ways),
        "fp8" if fp8 else "bf16", "with" if settings.rdma else "NVLink alone, without",
        sum(transport.num_bytes for transport in made.values()) / 1e6,
    )  # fmt: skip
    return DeepEPDispatcher({way: made[chosen[way]] for way in ways}, most)


def low_latency_rows(engine: EngineConfig, shape: ExpertShape) -> int:
    """Room of the low-latency buffers: rows that a rank may dispatch in one step."""
    most = shape.max_decode_rows if engine.deepep_mode != "low_latency" else shape.max_rows
    return engine.deepep_num_max_dispatch_tokens_per_rank or most


def _make(name: str, library: Any, comm: Comm, settings: Settings, chosen: dict[Way, str]) -> Transport:
    ways = tuple(way for way, by in chosen.items() if by == name)
    if name == "v2":
        from toolkit.engine.moe.deepep_elastic import ElasticTransport

        return ElasticTransport(library, comm, settings, ways)
    from toolkit.engine.moe.deepep_legacy import LegacyTransport

    return LegacyTransport(library, comm, settings, ways)


class DeepEPDispatcher:
    """Chooses the way of each step."""

    def __init__(self, transports: dict[Way, Transport], most: dict[Way, int]) -> None:
        self.transports, self.most = transports, most
        self.masked = "low_latency" in transports and transports["low_latency"].masked

    def way(self, step: StepRows) -> Way:
        """Low latency when no rank prefills and every rank's rows fit."""
        if "normal" not in self.transports:
            return "low_latency"
        fits = not step.is_extend and max(step.rows) <= self.most["low_latency"]
        return "low_latency" if fits and "low_latency" in self.transports else "normal"

    def capturable(self, step: StepRows) -> bool:
        return self.way(step) == "low_latency"

    def dispatch_start(self, x_SD: Tensor, slot_ids_SK: Tensor, weights_SK: Tensor, step: StepRows) -> Any:
        way = self.way(step)
        assert max(step.rows) <= self.most[way], f"{step.rows} rows, deepep {way} has room for {self.most[way]} a rank"
        assert x_SD.dtype == torch.bfloat16, f"deepep moves bfloat16, not {x_SD.dtype}"
        transport = self.transports[way]
        handle = transport.dispatch_start(way, x_SD, slot_ids_SK.contiguous(), weights_SK.float().contiguous(), step)
        return transport, handle

    def dispatch_finish(self, handle: Any) -> tuple[Dispatched, Any]:
        transport, inner = handle
        rows, inner = transport.dispatch_finish(inner)
        return rows, (transport, inner)

    def combine_start(self, y: Tensor, handle: Any) -> Any:
        transport, inner = handle
        return transport, transport.combine_start(y, inner)

    def combine_finish(self, handle: Any) -> Tensor:
        transport, inner = handle
        combined: Tensor = transport.combine_finish(inner)
        return combined


def expected_rows(step: StepRows, shape: ExpertShape) -> int:
    """Rows that a slot gets when routing is even."""
    return max(1, -(-sum(step.rows) * shape.top_k // shape.num_slots))
