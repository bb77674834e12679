"""A sound experiment for tests of the launcher."""

from __future__ import annotations

from typing import Any

from toolkit.config.experiment import ExpConfig
from toolkit.config.mapping import from_mapping
from toolkit.config.resolve import resolve

TINY_MOE = {
    "model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64,
    "max_position_embeddings": 512,
}  # fmt: skip


def experiment(**groups: dict[str, Any]) -> ExpConfig:
    """A sound experiment on this machine with ``groups``' keys replaced."""
    base: dict[str, Any] = {
        "exp": "test",
        "model": {"name": "m", "hf_config": TINY_MOE, "tokenizer": "bytes", "load_format": "dummy"},
        "parallel": {"tp_size": 4, "dp_size": 4, "ep_size": 4, "enable_dp_attention": True},
    }
    for group, keys in groups.items():
        base[group] = {**base.get(group, {}), **keys} if isinstance(keys, dict) else keys
    return resolve(from_mapping(base, ExpConfig))
