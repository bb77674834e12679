"""What a run's config and plan say of it: objectives, mapping, every key by its dotted name. Pure.

Both are read from a folder that anyone may have written: nothing is taken to have its type. Read next: load.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from toolkit.analysis.goodput import Slo


def objectives(config: dict[str, Any]) -> tuple[Slo, list[str]]:
    """``load.slo_*_ms``, all 0 where none is set, and those that are no time, with their value: left out."""
    load = config.get("load")
    load = load if isinstance(load, dict) else {}
    bounds = {field.name: load.get(f"slo_{field.name}") or 0.0 for field in dataclasses.fields(Slo)}
    wrong = [name for name, bound in bounds.items() if not isinstance(bound, (int, float)) or bound < 0]
    slo = Slo(**{name: 0.0 if name in wrong else float(bound) for name, bound in bounds.items()})
    return slo, [f"load.slo_{name}={bounds[name]!r}" for name in wrong]


def mapping(plan: dict[str, Any], config: dict[str, Any]) -> str:
    """``DEP=16`` and its like; empty where neither says."""
    if isinstance(plan.get("mapping"), str):
        return str(plan["mapping"])
    parallel = config.get("parallel")
    names = ("tp_size", "dp_size", "ep_size")
    if not isinstance(parallel, dict) or not all(name in parallel for name in names):
        return ""
    return " ".join(f"{name.removesuffix('_size').upper()}={parallel[name]}" for name in names)


def dotted(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``{"engine": {"page_size": 16}}`` -> ``engine.page_size``, 16."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
