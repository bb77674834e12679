"""Kernels that follow one another without a gap: programmatic dependent launch, of Hopper and later GPUs.

A kernel of a chain is launched while the one before it still runs, and begins with ``follow``, which waits for that
one's end: nothing is read or written earlier than without it, only the time to start is hidden. ``WIDEEP_PDL=0`` turns
it off, to compare. Knows no arithmetic. Used by every kernel of a decode step.
"""

from __future__ import annotations

import os
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PDL_ENV = "WIDEEP_PDL"


@triton.jit
def follow(PDL: tl.constexpr):
    """To be called by every program before its first access to memory that another kernel writes."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@cache
def chained() -> dict[str, bool]:
    """Options of a launch: whether the kernel is one of a chain."""
    if os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get(PDL_ENV) == "0":
        return {"PDL": False}
    if torch.version.hip or torch.cuda.get_device_capability() < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
