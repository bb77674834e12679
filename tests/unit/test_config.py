"""The experiment config: types, unknown keys, what resolve fills in, and that every file of conf/ composes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from toolkit.config.compose import from_omegaconf, register_hydra_defaults
from toolkit.config.experiment import GROUPS, ExpConfig
from toolkit.config.help import help_text
from toolkit.config.load import LoadConfig
from toolkit.config.mapping import explain_override, from_mapping, to_mapping
from toolkit.config.resolve import resolve
from toolkit.engine.arch import read_arch
from toolkit.engine.dims import ParallelDims

CONF = Path(__file__).parents[2] / "conf"


def compose(*overrides: str) -> ExpConfig:
    import hydra

    register_hydra_defaults()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return from_omegaconf(hydra.compose("config", list(overrides)))


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def test_a_mapping_survives_the_round_trip() -> None:
    cfg = dataclasses.replace(ExpConfig(), exp="x", load=LoadConfig(concurrency=[3], osl=7))
    assert from_mapping(to_mapping(cfg), ExpConfig) == cfg


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"load": {"concurency": [1]}}, r"load\.concurency is not a config key; did you mean concurrency\?"),
        ({"lod": {}}, r"lod is not a config key; did you mean load\?"),
        ({"load": {"osl": "many"}}, r"load\.osl='many': Expected `int`"),
        ({"cluster": {"launcher": "pbs"}}, r"cluster\.launcher='pbs'.*use one of: local, slurm"),
        ({"load": {"concurrency": [1, "two"]}}, r"load\.concurrency\[1\]='two'"),
    ],
)
def test_a_wrong_mapping_is_explained(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_mapping(values, ExpConfig)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("load.concurency=[1]", "load.concurency is not a config key; did you mean concurrency?"),
        ("+parallel.tpsize=4", "parallel.tpsize is not a config key; did you mean tp_size?"),
        ("load.concurrency=[1]", None),
        ("cluster.envv.A=1", "cluster.envv is not a config key; did you mean env?"),
        ("cluster.env.A=1", None),
        ("parallel=dep4", None),
        ("hydra.verbose=true", None),
        ("model.hf_config.hidden_size=64", None),
    ],
)
def test_explain_override(word: str, message: str | None) -> None:
    assert explain_override(word) == message


def test_a_dict_takes_keys_from_the_command_line() -> None:
    cluster = compose("cluster.env.NCCL_MAX_NCHANNELS=8", "cluster.role_env.rank.A=x", "cluster.env.B=y").cluster
    assert cluster.env == {"NCCL_MAX_NCHANNELS": "8", "B": "y"}
    assert cluster.role_env == {"rank": {"A": "x"}}
    pools = compose("cluster.pools.frontend.partition=cpu", "deploy.decode.engine.page_size=32")
    assert (pools.cluster.pools, pools.deploy.decode.engine) == ({"frontend": {"partition": "cpu"}}, {"page_size": 32})


def test_help_names_every_key() -> None:
    text = help_text()
    for group, cls in GROUPS.items():
        for field in dataclasses.fields(cls):
            assert f"  {group}.{field.name}=" in text


def test_resolve_rehearses_a_gpu_experiment_on_cpu_and_leaves_what_the_user_named() -> None:
    cfg = compose("+exp=dep16", "cluster=local", "load.osl=99")
    resolved = resolve(cfg, explicit={"exp", "cluster", "load.osl"})
    assert resolved.model.name == "tiny-deepseek-v3"
    assert resolved.load.concurrency == cfg.rehearsal["load"]["concurrency"] != cfg.load.concurrency
    assert resolved.load.osl == 99
    assert resolved.parallel == cfg.parallel
    assert resolved.model.dtype == "float32"
    assert resolve(cfg, explicit={"model"}).model.name == "deepseek-v3"


def test_resolve_names_the_file_of_a_placement_not_a_link_that_moves_on(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "dump.pt").touch()
    (tmp_path / "latest").symlink_to("first")

    def resolved(given: str) -> str:
        return resolve(from_mapping({"engine": {"init_expert_location": given}}, ExpConfig)).engine.init_expert_location

    assert resolved(f"{tmp_path}/latest/dump.pt") == f"{tmp_path.resolve()}/first/dump.pt"
    assert resolved("trivial") == "trivial" and resolved('{"logical_count": [[1]]}') == '{"logical_count": [[1]]}'


def test_resolve_leaves_a_gpu_experiment_on_gpus_alone() -> None:
    cfg = compose("+exp=dep16")
    resolved = resolve(cfg)
    assert (resolved.model.name, resolved.model.dtype, resolved.load) == ("deepseek-v3", "bfloat16", cfg.load)


def test_resolve_fills_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("WIDEEP_CACHE", raising=False)
    resolved = resolve(compose("+exp=smoke", "engine.moe_a2a_backend=none"))
    assert resolved.model.path == resolved.model.tokenizer == "/home/someone/.cache/wideep-toolkit/smollm2-moe"
    assert resolved.engine.moe_a2a_backend == "allgather"
    monkeypatch.setenv("WIDEEP_CACHE", "/elsewhere")
    assert resolve(compose("+exp=smoke")).model.path == "/elsewhere/smollm2-moe"


def test_an_unknown_rehearsal_group_is_refused() -> None:
    cfg = dataclasses.replace(ExpConfig(), rehearsal={"lod": {"osl": 1}})
    with pytest.raises(ValueError, match=r"rehearsal\.lod is not a config group; did you mean load"):
        resolve(cfg)


@pytest.mark.parametrize("group", list(GROUPS))
def test_every_choice_of_a_group_is_sound(group: str) -> None:
    for choice in choices(group):
        keys = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())
        inherits = keys.pop("defaults") not in (["defaults"], ["slurm"])
        cfg = compose(f"{group}={choice}") if inherits else from_mapping({group: keys}, ExpConfig)
        if group == "parallel":
            mapping = ParallelDims.of(cfg.parallel).mapping
            assert choice == ("dep1" if mapping == "TP=1" else mapping.replace("=", "").lower())
        if group == "model" and cfg.model.hf_config:
            assert read_arch(cfg.model).hidden_size == cfg.model.hf_config["hidden_size"]


def test_a_choice_keeps_the_defaults_of_its_group() -> None:
    cfg = compose("parallel=tep4", "cluster=h100", "load=smoke")
    assert (cfg.parallel.tp_size, cfg.parallel.ep_size, cfg.parallel.dp_size) == (4, 4, 1)
    assert (cfg.cluster.launcher, cfg.cluster.gpu_memory_gb, cfg.cluster.time_min) == ("slurm", 80, 60)
    assert cfg.load == LoadConfig(concurrency=[1, 2, 4, 8], osl=16, max_client_verdict="client_limited")


@pytest.mark.parametrize("exp", choices("exp"))
def test_every_experiment_composes_under_its_own_name(exp: str) -> None:
    assert compose(f"+exp={exp}").exp == exp


def test_the_tiny_model_has_every_key_of_the_model_it_stands_for() -> None:
    tiny, real = (compose(f"model={name}").model.hf_config for name in ("tiny", "deepseek_v3"))
    assert tiny is not None and real is not None
    assert tiny.keys() == real.keys()
    assert tiny["rope_scaling"].keys() == real["rope_scaling"].keys()
