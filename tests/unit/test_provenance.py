"""What a run folder keeps of its making: packages, the code's diff, the image, the exact config to run again."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.unit.launch_experiment import experiment
from toolkit.config.cluster import ClusterConfig
from toolkit.config.compose import from_omegaconf
from toolkit.config.experiment import ExpConfig
from toolkit.config.mapping import to_mapping
from toolkit.config.resolve import resolve
from toolkit.launch import provenance_files
from toolkit.launch.__main__ import experiment_again


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


def test_a_dirty_checkout_leaves_its_diff(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    assert provenance_files.diff(tmp_path) == ""
    (tmp_path / "code.py").write_text("a = 2\n")
    (tmp_path / "new.py").write_text("")
    text = provenance_files.diff(tmp_path)
    assert "-a = 1\n+a = 2" in text and "# not tracked: new.py" in text
    git(tmp_path, "checkout", "-q", "code.py")
    (tmp_path / "patch").write_text(text)
    git(tmp_path, "apply", "patch")
    assert (tmp_path / "code.py").read_text() == "a = 2\n", "the diff can be applied to the commit"


def test_a_folder_that_is_no_checkout_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance_files.diff(tmp_path) == ""


def test_every_package_is_listed_with_its_version() -> None:
    import torch

    lines = provenance_files.packages().splitlines()
    assert f"torch=={torch.__version__}" in lines or any(line.startswith("torch @ ") for line in lines)
    assert lines == sorted(lines, key=str.lower) and len(lines) > 20


def test_slurms_record_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert provenance_files.slurm_job() == ""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "JobId=$4 Comment=https://me:secret@host/x"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert provenance_files.slurm_job() == "JobId=42 Comment=https://host/x"


def test_an_image_is_known_by_its_digest(tmp_path: Path) -> None:
    digest = f"sha256:{'a' * 64}"
    named = provenance_files.container(ClusterConfig(container_image=f"docker://nvcr.io/x/y@{digest}"))
    assert named["digest"] == digest and named["runtime"] == "pyxis"
    image = tmp_path / "engine.sqsh"
    image.write_bytes(b"layers" * 1000)
    known = provenance_files.container(ClusterConfig(container_image=str(image)))
    assert known["digest"] == f"sha256:{hashlib.sha256(image.read_bytes()).hexdigest()}" and known["bytes"] == 6000


def test_a_large_image_is_known_by_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance_files, "WHOLE_BYTES", 100)
    monkeypatch.setattr(provenance_files, "END_BYTES", 10)
    image = tmp_path / "engine.sqsh"
    image.write_bytes(b"0123456789" * 20 + b"abcdefghij")
    known = provenance_files.container(ClusterConfig(container_image=str(image)))
    assert known["ends_digest"] == f"sha256:{hashlib.sha256(b'0123456789abcdefghij').hexdigest()}"
    assert "digest" not in known


def test_a_saved_config_is_run_again_as_it_was(tmp_path: Path) -> None:
    cfg = experiment(
        load={"osl": 7, "concurrency": [3]}, rehearsal={"load": {"osl": 99}}, resume=True, run_dir=str(tmp_path)
    )
    again = to_mapping(cfg) | {"load": {**to_mapping(cfg.load), "osl": 7}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(again, sort_keys=False))
    node, overrides = experiment_again(str(tmp_path), ["load.temperature=0.5"])
    found = resolve(from_omegaconf(node))
    assert isinstance(found, ExpConfig) and overrides == ["load.temperature=0.5"]
    assert (found.load.osl, found.load.concurrency, found.load.temperature) == (7, [3], 0.5)
    assert (found.resume, found.run_dir, found.engine, found.model) == (False, "", cfg.engine, cfg.model)
    with pytest.raises(ValueError, match="did you mean osl"):
        experiment_again(str(tmp_path), ["load.oslx=1"])
    with pytest.raises(ValueError, match="is not there"):
        experiment_again(str(tmp_path / "nothing"), [])
