"""DecodeGraphs: decode steps as CUDA graphs, one for each batch size of a few, captured once at start.

A graph reads tensors at fixed addresses (``staging.StaticInts``) and pads the batch: every rank of the worker replays
the graph of the same size, so that collectives inside have the sizes they were captured with. Whatever a captured step
reads must keep its address afterwards: weights, expert maps, the KV cache. Logits of all rows and the greedy choice are
part of the graph. Knows neither requests' options nor the queue. Read next: ``runner.py``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from toolkit.engine.attention.backend import AttentionBackend
from toolkit.engine.core import Batch, StepContext
from toolkit.engine.inputs import LastTokens, resolve_tokens, token_arrays
from toolkit.engine.models.base import Forward, Model
from toolkit.engine.parallel import Groups, PaddingMode, TokenLayout
from toolkit.engine.staging import Ints, StaticInts, ints

log = logging.getLogger(__name__)


def bucket_sizes(most: int) -> tuple[int, ...]:
    """Batch sizes to capture, ascending: 1, 2, 4, then steps of 8 to 64, of 16 to 256, of 64 beyond, and ``most``."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most, 64)]
    return (*(size for size in sizes if size < most), most)


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: StaticInts
    logits_NV: Tensor
    greedy_N: Tensor


class DecodeGraphs:
    """The captured decode steps of one rank.

    Args:
        max_len: the longest context that a step can have.
        sizes: batch sizes, ascending.
        overlap: steps run as two halves that take turns. A graph cuts its rows in the middle, padding or not.
        done: called after each capture with how many there are.
    """

    def __init__(
        self,
        model: Model,
        attention: AttentionBackend,
        groups: Groups,
        last: LastTokens,
        max_len: int,
        sizes: Sequence[int],
        padding: PaddingMode,
        overlap: bool,
        device: str,
        done: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._model, self._attention, self._groups, self._last = model, attention, groups, last
        self._overlap = overlap
        self._max_len, self._padding, self._device = max_len, padding, device
        self._pool: Any = None  # memory that the graphs share
        self._captured: dict[int, _Captured] = {}
        begin = time.perf_counter()
        for count, size in enumerate(
            sorted(sizes, reverse=True), start=1
        ):  # the largest first: others reuse its memory
            self._captured[size] = self._capture(size)
            done(count)
        self.sizes = tuple(sorted(sizes))
        log.info("captured decode graphs of %s requests in %.1f s", self.sizes, time.perf_counter() - begin)

    def size_for(self, ctx: StepContext) -> int | None:
        """The graph that holds every rank's part of the step; None: run it as it is."""
        if ctx.is_extend or ctx.dp_tokens != ctx.dp_logit_rows:
            return None
        assert self._overlap or ctx.first_half is None, f"halves {ctx.first_half} agreed on without overlap"
        most = max(ctx.dp_tokens)
        return next((size for size in self.sizes if size >= most), None)

    def run(self, size: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """Launches the step. Returns the logits [n, V] and most likely tokens [n] of its n requests, in batch order.

        Both are overwritten by the next step of this size.
        """
        captured = self._captured[size]
        arrays = token_arrays(batch, self._last, size)
        arrays.append(ints([batch.num_tokens]))
        captured.inputs.fill(arrays + self._plan_arrays(batch, size))
        captured.graph.replay()
        n = batch.num_tokens
        return captured.logits_NV[:n], captured.greedy_N[:n]

    def _capture(self, size: int) -> _Captured:
        shapes: list[tuple[int, ...]] = [(size,), (size,), (size,), (1,)]
        for part in (slice(0, size), *self._halves(size)):
            shapes += self._attention.static_shapes(part.stop - part.start, self._max_len)
        inputs = StaticInts(shapes, self._device)
        empty = Batch()
        arrays = token_arrays(empty, self._last, size)
        arrays.append(ints([0]))
        inputs.fill(arrays + self._plan_arrays(empty, size))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what is compiled, allocated or chosen at first use
                self._step(size, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            logits, greedy = self._step(size, inputs)
        self._pool = self._pool or graph.pool()
        return _Captured(graph, inputs, logits, greedy)

    def _step(self, size: int, inputs: StaticInts) -> tuple[Tensor, Tensor]:
        ids_T, positions_T, rows_T, num_valid, *views = inputs.views
        parts = (slice(0, size), *self._halves(size))
        each = len(views) // len(parts)
        whole, *halves = (
            self._forward(positions_T, part, num_valid, views[i * each : (i + 1) * each])
            for i, part in enumerate(parts)
        )
        step = replace(whole, halves=(halves[0], halves[1])) if halves else whole
        hidden = step.layout.gather(self._model.forward(resolve_tokens(ids_T, rows_T, self._last), step))
        logits = self._model.logits(hidden, (size,) * self._groups.dims.dp_size)
        greedy = logits.argmax(-1).int()
        self._last.values[:size] = greedy
        return logits, greedy

    def _forward(self, positions_T: Tensor, part: slice, num_valid: Tensor, views: list[Tensor]) -> Forward:
        """The rows ``part`` of the step, of which those from ``num_valid`` on are padding."""
        rows = part.stop - part.start
        everywhere = (rows,) * self._groups.dims.dp_size
        ctx = StepContext(0, everywhere, everywhere, is_extend=False)
        valid = num_valid if rows == len(positions_T) else (num_valid - part.start).clamp(0, rows)
        layout = TokenLayout(ctx, self._groups, self._padding, valid)
        plan = self._attention.static_plan(rows, self._max_len, views)
        return Forward(positions_T[part], layout, plan, self._attention)

    def _halves(self, size: int) -> tuple[slice, ...]:
        return (slice(0, size // 2), slice(size // 2, size)) if self._overlap and size > 1 else ()

    def _plan_arrays(self, batch: Batch, size: int) -> list[Ints]:
        """What attention reads of the batch, and of its halves."""
        arrays: list[Ints] = []
        for part in (slice(0, size), *self._halves(size)):
            arrays += self._attention.static_arrays(Batch(batch.decode[part]), part.stop - part.start, self._max_len)
        return arrays
