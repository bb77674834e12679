"""Which way imports point. The source is walked, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def modules() -> dict[str, Path]:
    """Every module of the package by dotted name."""
    found = {}
    for file in sorted((ROOT / "toolkit").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Modules that ``name`` imports anywhere, ``from package import module`` included."""
    return set(_imports(ast.parse(MODULES[name].read_text())))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def violations(importers: str, *allowed: str) -> list[str]:
    """``importer -> imported`` for imports of the toolkit by ``importers`` that are not within ``allowed``."""
    return [
        f"{name} -> {imported}"
        for name in MODULES
        if within(name, importers)
        for imported in sorted(imports(name))
        if within(imported, "toolkit") and imported != "toolkit" and not within(imported, *allowed)
    ]


BASE = (
    "toolkit.cache", "toolkit.config", "toolkit.records", "toolkit.registry", "toolkit.point_files",
    "toolkit.heartbeat",
)  # fmt: skip


@pytest.mark.parametrize("module", BASE)
def test_the_base_imports_nothing_of_the_toolkit_but_the_disk_schema(module: str) -> None:
    assert violations(module, module, "toolkit.records") == []


def test_the_engine_knows_no_launcher_load_generator_or_analysis() -> None:
    assert violations("toolkit.engine", *BASE, "toolkit.engine") == []


FIGURES = tuple(f"toolkit.analysis.{name}" for name in ("metrics", "steady", "goodput", "sweep_row"))


def test_the_load_generator_knows_http_only() -> None:
    assert violations("toolkit.loadgen", *BASE, "toolkit.loadgen", *FIGURES) == []


def test_the_analysis_reads_files_only() -> None:
    assert violations("toolkit.analysis", *BASE, "toolkit.analysis") == []
    heavy = [n for n in MODULES if within(n, "toolkit.analysis") and any(within(m, "torch") for m in imports(n))]
    assert heavy == []


def test_the_frontend_shares_only_messages_and_plain_data_with_the_ranks() -> None:
    shared = [f"toolkit.engine.{name}" for name in ("messages", "core", "args", "arch", "dims", "frontend")]
    assert violations("toolkit.engine.frontend", *BASE, *shared) == []


def test_dispatchers_do_not_import_each_other() -> None:
    dispatchers = ["toolkit.engine.moe.allgather", "toolkit.engine.moe.all_to_all"]
    assert [(a, b) for a in dispatchers for b in imports(a) if b in dispatchers] == []


def test_only_the_config_knows_omegaconf() -> None:
    assert [name for name in MODULES if any(within(m, "omegaconf") for m in imports(name))] == [
        "toolkit.config.compose"
    ]


def loaded_by(statement: str, *packages: str) -> list[str]:
    """Which of ``packages`` are in memory after ``statement`` in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*[p for p in {packages!r} if p in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.split()


def test_the_launcher_answers_without_heavy_libraries() -> None:
    statement = "import toolkit.launch.__main__, toolkit.launch.help, toolkit.launch.check, toolkit.launch.run"
    heavy = ("torch", "pandas", "matplotlib", "transformers", "pyarrow", "numpy", "submitit", "aiohttp")
    assert loaded_by(statement, *heavy) == []


def test_a_rank_needs_no_launcher_libraries_and_no_gpu_libraries() -> None:
    gpu = ("deep_ep", "deep_gemm", "flash_mla", "nixl")
    launcher = ("hydra", "omegaconf", "submitit", "pandas", "matplotlib", "aiohttp")
    assert loaded_by("import toolkit.engine.worker", *gpu, *launcher) == []
