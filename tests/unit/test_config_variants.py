"""An experiment with variants is as many experiments; the later ones are compared with the first."""

from __future__ import annotations

from pathlib import Path

import yaml
from omegaconf import OmegaConf

from toolkit.config.compose import from_omegaconf, variants
from toolkit.config.experiment import ExpConfig
from toolkit.config.mapping import from_mapping, to_mapping

CONF = Path(__file__).parents[2] / "conf"


def node(**changes: object) -> object:
    values = to_mapping(ExpConfig(exp="ab")) | changes
    return OmegaConf.create(values)


def test_without_variants_nothing_changes() -> None:
    plain = node()
    assert variants(plain, ["a=1"]) == [(plain, ["a=1"])]


def test_each_variant_is_the_experiment_with_its_keys_and_name() -> None:
    given = {"off": None, "on": {"engine": {"enable_eplb": True}, "load": {"osl": 9}}}
    made = variants(node(variants=given), ["load.osl=3"])
    cfgs = [from_omegaconf(one) for one, _ in made]
    assert [cfg.exp for cfg in cfgs] == ["ab-off", "ab-on"] and [cfg.variants for cfg in cfgs] == [{}, {}]
    assert [cfg.engine.enable_eplb for cfg in cfgs] == [False, True] and cfgs[1].load.osl == 9
    assert cfgs[0].compare_with == ""
    assert cfgs[1].compare_with == str(Path("results").absolute() / "ab-off" / "latest")
    assert [words for _, words in made] == [["load.osl=3", "variant=off"], ["load.osl=3", "variant=on"]]


def test_the_ab_experiment_differs_in_eplb_only() -> None:
    values = yaml.safe_load((CONF / "exp" / "eplb_ab.yaml").read_text())
    assert list(values["variants"]) == ["without", "with"]
    for variant in values["variants"].values():
        assert list(variant) == ["engine"]
        from_mapping({"engine": values["engine"] | variant["engine"]}, ExpConfig)


def test_the_parallel_group_is_the_aggregated_variants_where_others_have_pools() -> None:
    given = {"agg": {"deploy": {"mode": "agg"}}, "disagg": {"deploy": {"mode": "disagg"}}}
    words = ["parallel=dep4", "parallel.ep_size=2", "parallel@deploy.prefill.parallel=dep2"]
    (_, agg), (_, disagg) = variants(node(variants=given), words)
    assert agg == [*words, "variant=agg"] and disagg == [words[2], "variant=disagg"]
    del given["agg"]  # nothing is aggregated: `resolve` says that `parallel` is ignored
    assert variants(node(variants=given), words)[0][1] == [*words, "variant=disagg"]
