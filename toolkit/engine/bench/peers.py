"""Paged attention of other packages, for ``bench.attention``: flash-attn-4 and FlashInfer over the engine's cache.

They are no backends of the engine: docs/performance.md says why. Here they take the engine's plans and pages, so that
all are timed over the same bytes. A peer serves one batch: FlashInfer is planned by the host for it when it first runs,
outside the CUDA graph.
Read next: ``attention.py``, ``../attention/paged.py``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.engine.attention.backend import AttentionBackend, KindPlan
from toolkit.engine.attention.paged import PagedAttention, PagedSegment
from toolkit.engine.kv.pool import KVCache
from toolkit.engine.staging import Ints

WORKSPACE = 256 << 20  # bytes for FlashInfer's partial results


class PeerMissing(Exception):
    """It is not installed; the text says what to install."""


@dataclass(frozen=True)
class Peer:
    """How it is made over a cache, and the sizes of pages to time it with."""

    make: Callable[[KVCache, str], AttentionBackend]
    pages: tuple[int, ...]


class FlashAttention4(PagedAttention):
    """FlashAttention in the CuTe DSL. On Hopper (SM90) it neither cuts long requests into parts nor takes latents, and
    reads pages of 128 tokens by the copy engine (TMA), others by threads."""

    def __init__(self, cache: KVCache, device: str) -> None:
        super().__init__(cache, device)
        self._attend: Any = imported("flash_attn.cute").flash_attn_varlen_func

    def _paged(self, q: Tensor, layer: int, kind: KindPlan, segment: PagedSegment, scale: float) -> Tensor:
        k, v = self.cache.pages(layer)
        one = segment.max_q == 1  # a dimension for the one query: without it, the schedule of ragged queries is taken
        out: Tensor
        out, _ = self._attend(
            q[:, None] if one else q, k, v, cu_seqlens_q=None if one else segment.cu_q, seqused_k=segment.lens_n,
            max_seqlen_q=segment.max_q, max_seqlen_k=segment.max_kv, page_table=segment.tables_nP, softmax_scale=scale,
            causal=True, window_size=(kind.window - 1, 0) if kind.window else (None, None),
        )  # fmt: skip
        return out[:, 0] if one else out


class FlashInfer(PagedAttention):
    """Its wrappers for paged decode (tensor cores) and prefill, with the kernels ``fa2`` or ``fa3``.

    Left to itself, FlashInfer takes fa2 for decode in bf16 and fa3 for prefill on Hopper.
    """

    def __init__(self, cache: KVCache, device: str, kernels: str) -> None:
        super().__init__(cache, device)
        self._library: Any = imported("flashinfer")
        self._kernels = kernels
        self._wrapper: Any = None

    def _paged(self, q: Tensor, layer: int, kind: KindPlan, segment: PagedSegment, scale: float) -> Tensor:
        if self._wrapper is None:
            self._wrapper = self._planned(q, kind, segment, scale)
        out: Tensor = self._wrapper.run(q, self.cache.pages(layer))
        return out

    def _planned(self, q: Tensor, kind: KindPlan, segment: PagedSegment, scale: float) -> Any:
        page, spec = self.cache.page_size, self.cache.spec
        arrays = page_lists(segment.tables_nP.cpu().numpy(), segment.lens_n.cpu().numpy(), page)
        lists = [torch.from_numpy(a) for a in arrays]
        workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=self.device)
        shape = (q.shape[1], spec.heads, spec.k_dim, page)
        options = {
            "q_data_type": q.dtype, "kv_data_type": q.dtype, "sm_scale": scale,
            "window_left": kind.window - 1 if kind.window else -1,
        }  # fmt: skip
        if segment.max_q == 1:
            wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
                workspace, use_cuda_graph=True, use_tensor_cores=True, backend=self._kernels,
                **dict(zip(DECODE_BUFFERS, (part.to(self.device) for part in lists))),
            )  # fmt: skip
            wrapper.plan(*lists, *shape, **options)
        else:
            wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(workspace, backend=self._kernels)
            wrapper.plan(segment.cu_q.cpu(), *lists, *shape, causal=True, **options)
        return wrapper


PEERS = {
    "flash-attn-4": Peer(FlashAttention4, (128, 64, 16)),
    "flashinfer-fa2": Peer(partial(FlashInfer, kernels="fa2"), (64, 16)),
    "flashinfer-fa3": Peer(partial(FlashInfer, kernels="fa3"), (64, 16)),
}
DECODE_BUFFERS = ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")


def page_lists(tables_nP: Ints, lens_n: Ints, page: int) -> tuple[Ints, Ints, Ints]:
    """Block tables as FlashInfer takes them: where the pages of each request begin, all pages, tokens in the last."""
    pages_n = -(-lens_n // page)
    begins = np.concatenate([[0], np.cumsum(pages_n)]).astype(np.int32)
    used = np.concatenate([table[:count] for table, count in zip(tables_nP, pages_n)]).astype(np.int32)
    return begins, used, (lens_n - (pages_n - 1) * page).astype(np.int32)


def imported(module: str) -> Any:
    """``module`` of a peer.

    Raises:
        PeerMissing: with the pip line.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PeerMissing(f"not installed ({error}): pip install 'wideep-toolkit[peers]'") from None
