"""What a reader opens: the notebook runs to its conclusion, the report renders in a browser without an error."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib.image import imread
from nbclient import NotebookClient

from tests.conftest import REPOSITORY
from tests.unit.analysis_run import make_run
from toolkit import records
from toolkit.analysis.finish import finish_run


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    for _ in range(2):
        make_run(tmp_path, points=(1, 4), requests_per_slot=3)
    shutil.copy(REPOSITORY / "results" / "review.ipynb", tmp_path)
    notebook = nbformat.read(tmp_path / "review.ipynb", as_version=4)
    assert 10 <= len(notebook.cells) <= 18
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert "Best point:" in text and "correlation with imbalance" in text and "good, " in str(outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.fixture(scope="module")
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no browser: apt-get install chromium")


def browse(chromium: str, tmp_path: Path, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0", "--window-size=1240,1800",
        "--host-resolver-rules=MAP * ~NOTFOUND", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)


def test_the_report_renders_offline_without_an_error(chromium: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path, points=(1, 4), requests_per_slot=3)
    finish_run(folder)
    shot = tmp_path / "report.png"
    done = browse(chromium, tmp_path, folder / records.REPORT, f"--screenshot={shot}")
    assert not re.findall(r"CONSOLE.*|.*Refused to load.*", done.stderr)
    pixels = imread(shot)[..., :3]
    assert pixels.shape[1] == 1240
    assert (pixels.min(-1) < 0.5).mean() > 0.005, "no text"
    assert (np.ptp(pixels, axis=-1) > 0.3).sum() > 2000, "no chart in the first screens"
    dom = browse(chromium, tmp_path, folder / records.REPORT, "--dump-dom").stdout
    assert dom.count("data:image/png;base64,") == len(list((folder / records.CHARTS).glob("*.png")))
    assert dom.index("Best point") < dom.index("<table") < dom.index("<figure") < dom.index("config.yaml")


def test_the_browser_check_sees_an_error(chromium: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<html><body><script>console.error('broken');</script></body></html>")
    assert "CONSOLE" in browse(chromium, tmp_path, page, f"--screenshot={tmp_path / 'x.png'}").stderr
