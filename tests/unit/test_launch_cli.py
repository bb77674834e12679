"""The command line as a user types it, and what goes into manifest.json."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.launch import provenance
from toolkit.launch.__main__ import explain, override_names

ROOT = Path(__file__).parents[2]


def launch(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "toolkit.launch", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False, timeout=120)


def test_help_teaches() -> None:
    done = launch("--help")
    assert done.returncode == 0
    for text in ("+exp=smoke", "dry_run=true", "dep4, dep8, dep16", "load.concurrency=[1, 2, 4, 8]"):
        assert text in done.stdout


def test_the_config_is_shown_and_nothing_is_left_behind(tmp_path: Path) -> None:
    done = launch("+exp=smoke", f"cluster.results_dir={tmp_path}", "--cfg", "job")
    assert done.returncode == 0
    assert "name: smollm2-moe" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["+exp=smoke", "load.concurency=[1]"],
            "error: load.concurency is not a config key; did you mean concurrency?",
        ),
        (["+exp=smok"], "Could not find 'exp/smok'"),
        (["+exp=smoke", "load.osl=many"], "error: load.osl='many': Expected `int`"),
        (["+exp=dep16", "cluster=h100", "dry_run=true"], "error: cluster.gpu_memory_gb=80: weights and KV cache need"),
    ],
)
def test_a_mistake_ends_with_2_and_no_traceback(words: list[str], message: str) -> None:
    done = launch(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_dry_run_shows_the_plan_and_starts_nothing(tmp_path: Path) -> None:
    done = launch("+exp=dep16", "dry_run=true", f"cluster.results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "DEP=16, 16 GPUs on 2 nodes (slurm)" in lines[0]
    assert next(line.split()[:3] for line in lines if line.startswith("  rank-9 ")) == ["rank-9", "1", "1"]
    assert sum("-m toolkit.engine.worker" in line for line in lines) == 16
    assert any("experts" in line and "81.7" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_leaves_nothing_in_the_users_folder(tmp_path: Path) -> None:
    done = launch("-m", "+exp=smoke", "load.osl=4,8", "dry_run=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "osl 4" in done.stdout and "osl 8" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_explain() -> None:
    assert explain("dryrun=true") == "dryrun is not a config key; did you mean dry_run?"
    assert explain("+exp=smoke") is None
    assert explain("cluster=local") is None
    assert explain("--cfg") is None


def test_override_names() -> None:
    assert override_names(["+exp=dep16", "load.osl=3", "~load.seed"]) == {"exp", "load.osl", "load.seed"}


def test_the_environment_loses_its_secrets() -> None:
    env = {
        "HF_TOKEN": "s1",
        "OPENAI_API_KEY": "s2",
        "DB_PASSWORD": "s3",
        "INDEX": "https://me:s4@host/simple x https://other/s",
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": "/bin",
    }
    clean = provenance.environment(env)
    assert not any(f"s{i}" in value for value in clean.values() for i in range(1, 5))
    assert clean["INDEX"] == "https://<removed>@host/simple x https://other/s"
    assert (clean["PATH"], clean["TOKENIZERS_PARALLELISM"]) == ("/bin", "false")


def test_the_command_line_loses_its_secrets() -> None:
    assert provenance.clean("my_api_key=abc") == "my_api_key=<removed>"
    assert provenance.clean("deploy.api_key_env=MY_KEY") == "deploy.api_key_env=MY_KEY"
    assert provenance.clean("engine.max_total_tokens=64") == "engine.max_total_tokens=64"


def test_git_state(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    assert provenance.git_state(tmp_path) == {"commit": None, "dirty": None}
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    state = provenance.git_state(tmp_path)
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert provenance.git_state(tmp_path)["dirty"] is True
