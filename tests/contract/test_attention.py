"""The attention contract on CPU. ``tests/gpu/test_attention.py`` runs it over the GPU backends."""

from __future__ import annotations

import pytest
import torch

from tests.contract import attention_cases as cases


@pytest.mark.parametrize("step", cases.STEPS)
@pytest.mark.parametrize("window", [0, 48], ids=["global", "sliding"])
@pytest.mark.parametrize("page", [4, 64])
def test_attends(step: str, window: int, page: int) -> None:
    cases.check_attends("sdpa", step, page, window, torch.float32, "cpu", dim=16, groups=3)


@pytest.mark.parametrize("step", cases.STEPS)
def test_latent(step: str) -> None:
    cases.check_latent("sdpa", step, 16, torch.float32, "cpu", heads=2, dims=(24, 8))


@pytest.mark.parametrize("step", cases.STEPS)
def test_latent_in_fp8(step: str) -> None:
    cases.check_latent("sdpa", step, 16, torch.float32, "cpu", heads=2, dims=(24, 8), fp8=True)


def test_paged_plans_name_the_rows_that_sdpa_reads() -> None:
    """The tables that GPU kernels read are made with numpy; here against the reference's rows."""
    from toolkit.engine.attention.paged import PagedAttention, PagedSegment
    from toolkit.engine.attention.sdpa import RowSegment, SdpaAttention
    from toolkit.engine.kv.pool import KVSpec

    for window in (0, 48):
        g = cases.given("mixed", KVSpec(1, 8, 0), 16, torch.float32, "cpu", window)
        rows, paged = SdpaAttention(g.cache, "cpu").plan(g.batch), PagedAttention(g.cache, "cpu").plan(g.batch)
        assert torch.equal(rows.layers[0].rows_T, paged.layers[0].rows_T.long())
        for part in ("decode", "prefill"):
            ours, theirs = getattr(paged.layers[0], part), getattr(rows.layers[0], part)
            assert isinstance(ours, PagedSegment) and isinstance(theirs, RowSegment)
            assert ours.q_lens == theirs.q_lens and ours.tokens == theirs.tokens
            for i, seen in enumerate(theirs.kv_rows):
                table = (ours.tables_nP[i].long()[:, None] * 16 + torch.arange(16)).flatten()[: ours.lens_n[i]]
                assert torch.equal(table[len(table) - len(seen) :], seen)
                if part == "prefill" and not window:
                    gathered = ours.kv_rows[ours.cu_kv[i] : ours.cu_kv[i + 1]]
                    assert torch.equal(gathered.long(), seen)
