"""The kernel of decode attention: cases of ``tests/contract/decode_cases.py`` in 16 bits, and of many requests."""

from __future__ import annotations

import pytest
import torch

from tests.contract import decode_cases as cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*cases.SHAPES, (40, 4, 8, 128, 0, 4096), (300, 4, 8, 128, 0, 512)], ids=str)
def test_equals_float32(case: tuple[int, int, int, int, int, int], dtype: torch.dtype) -> None:
    cases.check(*case, device="cuda", dtype=dtype, longest=1100)
