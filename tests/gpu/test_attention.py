"""The attention contract over every backend that a GPU has."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.contract import attention_cases as cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

needs_fa3 = pytest.mark.skipif(importlib.util.find_spec("sgl_kernel") is None, reason="sglang-kernel is not installed")
needs_mla = pytest.mark.skipif(importlib.util.find_spec("flash_mla") is None, reason="sgl-flash-mla is not installed")
PAGED = [
    *(pytest.param(*what, marks=needs_fa3) for what in (("fa3", 16), ("fa3", 64), ("triton", 64), ("triton", 128))),
    ("varlen", 256),
]


@pytest.fixture(autouse=True)
def own_kernel_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that do not fill a GPU are decoded by the backend's own kernel nevertheless, in parts of two pages."""
    monkeypatch.setattr("toolkit.engine.attention.triton_decode.TritonAttention.least", 0)
    monkeypatch.setattr("toolkit.engine.attention.triton_decode.WHOLE", 128)
    monkeypatch.setattr("toolkit.engine.attention.triton_decode.SPAN", 128)


def skip_windows(backend: str, window: int) -> None:
    if backend == "varlen" and window:
        with pytest.raises(ValueError, match="without windows"):
            cases.check_attends(backend, "decode", 256, window, torch.bfloat16, "cuda:0")
        pytest.skip("varlen refuses sliding windows")


@pytest.mark.parametrize(("backend", "page"), [*PAGED, ("sdpa", 16)])
@pytest.mark.parametrize("step", cases.STEPS)
@pytest.mark.parametrize("window", [0, 48], ids=["global", "sliding"])
def test_attends(backend: str, page: int, step: str, window: int) -> None:
    skip_windows(backend, window)
    cases.check_attends(backend, step, page, window, torch.bfloat16, "cuda:0")


@pytest.mark.parametrize(("backend", "page"), PAGED)
@pytest.mark.parametrize("window", [0, 48], ids=["global", "sliding"])
def test_static_plan(backend: str, page: int, window: int) -> None:
    skip_windows(backend, window)
    cases.check_static_plan(backend, page, window, torch.bfloat16, "cuda:0")


@pytest.mark.parametrize(
    ("backend", "page"),
    [pytest.param("flash_mla", 64, marks=[needs_mla, needs_fa3]), pytest.param("fa3", 64, marks=needs_fa3)],
)
@pytest.mark.parametrize("step", cases.STEPS)
@pytest.mark.parametrize("heads", [16, 128])
def test_latent(backend: str, page: int, step: str, heads: int) -> None:
    cases.check_latent(backend, step, page, torch.bfloat16, "cuda:0", heads, (512, 64))


@needs_mla
@needs_fa3
@pytest.mark.parametrize("step", cases.STEPS)
@pytest.mark.parametrize("heads", [16, 128])
def test_latent_in_fp8(step: str, heads: int) -> None:
    """Scores are rounded to FP8 inside the kernel."""
    cases.check_latent("flash_mla", step, 64, torch.bfloat16, "cuda:0", heads, (512, 64), fp8=True)
