"""What the attention benchmark tells other packages, and what it says where they are not installed.

The packages run on GPUs alone. Here float32 stands in their place, which reads nothing but the arguments that their
documentation names: queries, pages, tables and lengths in their form must describe the engine's step.
"""

from __future__ import annotations

import importlib.util
import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract import attention_cases as cases
from toolkit.engine.attention.backend import make_attention
from toolkit.engine.bench import attention as bench
from toolkit.engine.bench.peers import PEERS, page_lists
from toolkit.engine.kv.pool import KVSpec
from toolkit.engine.staging import StaticInts, ints

DIM, KV_HEADS, GROUP, PAGE = 128, 2, 4, 16


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, left: int) -> Tensor:
    """One request: q [n, H, D] over k, v [m, kv heads, D]. ``left``: tokens seen before its own; -1: all."""
    k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.float(), k) * scale
    ago = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
    seen = ((ago >= 0) | (not causal)) & ((ago <= left) | (left < 0))
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor | None, seqused_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, page_table: Tensor, softmax_scale: float, causal: bool, window_size: tuple[Any, Any],
) -> tuple[Tensor, None]:  # fmt: skip
    queries = q.unbind() if cu_seqlens_q is None else [q[a:b] for a, b in pairwise(cu_seqlens_q)]
    assert max(map(len, queries)) == max_seqlen_q and int(seqused_k.max()) <= max_seqlen_k
    assert window_size[1] in (None, 0)
    outs = []
    for request, table, n in zip(queries, page_table, seqused_k.tolist()):
        pages = table[: -(-n // k.shape[1])].long()
        keys, values = (x[pages].flatten(0, 1)[:n] for x in (k, v))
        left = -1 if window_size[0] is None else window_size[0]
        outs.append(attend(request, keys, values, softmax_scale, causal, left))
    return torch.stack(outs) if cu_seqlens_q is None else torch.cat(outs), None


class Wrapper:
    """FlashInfer's, of decode and of prefill."""

    def __init__(self, workspace: Tensor, use_cuda_graph: bool = False, **options: Any) -> None:
        self.lists, self.options = [], options
        if use_cuda_graph:
            self.lists = [options[f"paged_kv_{name}_buffer"] for name in ("indptr", "indices", "last_page_len")]

    def plan(self, *args: Any, causal: bool = False, sm_scale: float, window_left: int, **_: Any) -> None:
        *arrays, heads, kv_heads, dim, page = args
        assert (heads, kv_heads, dim, page) == (KV_HEADS * GROUP, KV_HEADS, DIM, PAGE)
        *cu_q, begins, used, last = arrays
        if self.lists:
            assert all(torch.equal(a, b) for a, b in zip(self.lists, (begins, used, last)))
        self.cu_q = cu_q[0] if cu_q else torch.arange(len(begins))  # decode: one query a request
        self.begins, self.used, self.last = begins, used, last
        self.causal, self.scale, self.left = causal, sm_scale, window_left

    def run(self, q: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        outs = []
        for i, last in enumerate(self.last.tolist()):
            mine = self.used[self.begins[i] : self.begins[i + 1]].long()
            n = (len(mine) - 1) * PAGE + last
            keys, values = (x[mine].flatten(0, 1)[:n] for x in pages)
            query = q[self.cu_q[i] : self.cu_q[i + 1]]
            outs.append(attend(query, keys, values, self.scale, self.causal, self.left))
        return torch.cat(outs)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attn = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    flashinfer = SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=Wrapper, BatchPrefillWithPagedKVCacheWrapper=Wrapper
    )
    for name, module in (("flash_attn", SimpleNamespace(cute=flash_attn)), ("flash_attn.cute", flash_attn)):
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)  # type: ignore[arg-type]
    monkeypatch.setattr("toolkit.engine.bench.peers.WORKSPACE", 1)


@pytest.mark.parametrize("window", [0, 48], ids=["global", "sliding"])
@pytest.mark.parametrize("step", ["decode", "prefill"])
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_is_told_the_engines_step(packages: None, name: str, step: str, window: int) -> None:
    g = cases.given(step, KVSpec(KV_HEADS, DIM, DIM), PAGE, torch.float32, "cpu", window)
    peer = PEERS[name].make(g.cache, "cpu")
    q = torch.randn(len(g.k), KV_HEADS * GROUP, DIM)
    plan = peer.plan(g.batch)
    peer.write(g.k, g.v, 1, plan)
    wanted = cases.expected(g, q, 0.1, window, DIM)
    cases.close(peer.forward(q, 1, plan, 0.1), wanted, torch.float32)
    if step == "decode":  # as a graph captures it
        size, longest = len(g.batch.decode), 1024
        views = StaticInts(peer.static_shapes(size, longest), "cpu")
        views.fill(peer.static_arrays(g.batch, size, longest))
        again = PEERS[name].make(g.cache, "cpu")
        cases.close(again.forward(q, 1, again.static_plan(size, longest, views.views), 0.1), wanted, torch.float32)


def test_pages_of_requests_one_after_another() -> None:
    tables = ints([[7, 3, 9], [4, 0, 0], [5, 6, 0]])
    begins, used, last = page_lists(tables, ints([40, 1, 32]), 16)
    assert begins.tolist() == [0, 3, 4, 6]
    assert used.tolist() == [7, 3, 9, 4, 5, 6]
    assert last.tolist() == [8, 1, 16]


@pytest.mark.parametrize(("name", "module"), [("flash-attn-4", "flash_attn"), ("flashinfer-fa3", "flashinfer")])
def test_what_is_not_installed_is_one_row_that_says_how(name: str, module: str) -> None:
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"{module} is installed here")
    steps = [("decode", 2, 40), ("prefill", 1, 40)]
    (row,) = bench.measured([(bench.QWEN, name, 64), (bench.QWEN, name, 16)], steps, "cpu")
    assert "pip install 'wideep-toolkit[peers]'" in row.error and row.us == 0


@pytest.mark.parametrize("shape", [bench.Shape("all", 8, 2), bench.Shape("windows", 8, 2, window=48)])
@pytest.mark.parametrize("step", ["decode", "prefill"])
def test_outputs_are_compared_with_float32(shape: bench.Shape, step: str) -> None:
    g = cases.given(step, KVSpec(2, DIM, DIM), PAGE, torch.float32, "cpu", shape.window)
    scheduled = [s for s in g.batch.scheduled if s.num_tokens == g.batch.scheduled[-1].num_tokens]
    batch = type(g.batch)(tuple(scheduled)) if step == "decode" else type(g.batch)(prefill=tuple(scheduled))
    sdpa = make_attention("sdpa", g.cache, "cpu")
    plan = sdpa.plan(batch)
    q = torch.randn(batch.num_tokens, 8, DIM)
    for pages in g.cache.pages(1):
        pages.normal_()
    out = sdpa.forward(q, 1, plan, DIM**-0.5)
    assert bench.distance(out, q, g.cache, 1, scheduled, shape) < 1e-5
    assert bench.distance(out.roll(1, 1), q, g.cache, 1, scheduled, shape) > 0.5


def test_work_counts_what_is_seen() -> None:
    whole, window = bench.Shape("", 8, 2), bench.Shape("", 8, 2, window=1024)
    assert whole.pairs("prefill", 8192) == 8192**2 / 2
    assert window.pairs("prefill", 8192) == pytest.approx(sum(min(i + 1, 1024) for i in range(8192)), rel=1e-2)
    assert (window.pairs("decode", 4096), window.seen(512)) == (1024, 512)
