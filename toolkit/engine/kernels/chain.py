"""Kernels that follow one another without a gap: programmatic dependent launch, of Hopper and later GPUs.

A kernel of a chain is launched while the one before it still runs, and begins with ``follow``, which waits for that
one's end: nothing is read or written earlier than without it, only the time to start is hidden. ``WIDEEP_PDL`` is the
number of rows up to which a step does so, to compare: 0 turns it off.
Knows no arithmetic.
"""

from __future__ import annotations

import os
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PDL_ENV, MANY = "WIDEEP_PDL", 128


@triton.jit
def follow(PDL: tl.constexpr):
    """To be called by every program before its first access to memory that another kernel writes."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def chained(rows: int = 0) -> dict[str, bool]:
    """Options of a launch: whether the kernel is one of a chain.

    Args:
        rows: of the step. With many, kernels that wait their turn are in the way of those that run.
    """
    return {"PDL": True, "launch_pdl": True} if rows <= _most_rows() else {"PDL": False}


@cache
def _most_rows() -> int:
    """Rows of the largest step whose kernels are chained; -1: none can be."""
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.version.hip or torch.cuda.get_device_capability() < (9, 0):
        return -1
    return int(os.environ.get(PDL_ENV, MANY)) or -1
