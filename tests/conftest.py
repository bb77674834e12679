"""Fixtures and rules for all tests: one thread, the demo model built once, the marker of the slow ones."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import pytest

# Before anything imports torch; processes that tests start inherit it. Ranks and tests share few cores.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would fetch something fails at once instead
# A shell starts what runs in its background deaf to Ctrl-C, nohup to a closed terminal, and so would be all that tests
# press or close.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

REPOSITORY = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/e2e is marked e2e, so that ``-m 'not e2e'`` leaves out the slow part."""
    for item in items:
        if item.path.is_relative_to(REPOSITORY / "tests" / "e2e"):
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def demo_source() -> Path:
    """The GGUF file that the demo model is made from; skips where a package for it is missing."""
    from toolkit.engine import demo_gguf

    if importlib.util.find_spec("gguf") is None:
        pytest.skip("the library gguf is not installed: pip install -e '.[demo]'")
    try:
        return demo_gguf.find_gguf()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def demo_model(demo_source: Path) -> Path:
    """The demo model's folder, in the cache that the demo uses too (WIDEEP_CACHE); built when it is missing."""
    from toolkit.engine import demo_model

    return demo_model.build(demo_model.default_out())


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Reference data that is not part of the project: WIDEEP_SHARED_DATA, or ../shared/data; skips where absent."""
    folder = Path(os.environ.get("WIDEEP_SHARED_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder}: set WIDEEP_SHARED_DATA to its folder")
    return folder
