"""Writes the demo model as a Hugging Face Mixtral folder: config, tokenizer, safetensors shards, README.

Owns file names and formats, under the names the released Mixtral checkpoints use. It knows neither GGUF nor how
the gates were fitted. Read next: ``demo_model.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from toolkit.engine.demo_gguf import TokenizerParts

SHARD_BYTES = 400 * 10**6
INDEX = "model.safetensors.index.json"
# the dense FFN's projections -> Mixtral's expert weights
EXPERT_WEIGHTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def write_config(folder: Path, dense: dict[str, Any], experts: int, top_k: int) -> None:
    """config.json and generation_config.json. ``dense`` holds the source model's keys."""
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **dense,
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    _write_json(folder / "config.json", config)
    special = {key: dense[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {**special, "do_sample": False})


def write_tokenizer(folder: Path, parts: TokenizerParts, dense: dict[str, Any]) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE that splits numbers into digits."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(parts.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=parts.merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(parts.tokens[i], special=True, normalized=False) for i in parts.special_ids]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": parts.tokens[dense["bos_token_id"]],
        "eos_token": parts.tokens[dense["eos_token_id"]],
        "pad_token": parts.tokens[dense["pad_token_id"]],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": dense["max_position_embeddings"],
        "chat_template": parts.chat_template,
    }
    _write_json(folder / "tokenizer_config.json", config)


@dataclass(frozen=True)
class Shard:
    """One safetensors file to be written. The experts of a layer share one tensor's memory until then."""

    file: str
    tensors: dict[str, torch.Tensor]


def plan_shards(dense: dict[str, torch.Tensor], gates: list[torch.Tensor], experts: int) -> list[Shard]:
    """Dense weights and one gate a layer -> the shards of the MoE, each about ``SHARD_BYTES``."""
    groups: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in _moe_tensors(dense, gates, experts):
        if size + tensor.nbytes > SHARD_BYTES and groups[-1]:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return [Shard(f"model-{i + 1:05}-of-{len(groups):05}.safetensors", group) for i, group in enumerate(groups)]


def write_shard(folder: Path, shard: Shard) -> None:
    from safetensors.torch import save_file

    # safetensors refuses tensors that share memory, as the experts do
    tensors = {name: tensor.clone() for name, tensor in shard.tensors.items()}
    save_file(tensors, folder / shard.file, metadata={"format": "pt"})
    (folder / shard.file).chmod(0o644)  # safetensors makes it 0600; the folder may be shared


def write_index(folder: Path, shards: list[Shard]) -> None:
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors.values())
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def missing_files(folder: Path) -> list[str]:
    """What a complete folder has and this one has not."""
    files = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX]
    if (folder / INDEX).is_file():
        files += sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    return [name for name in files if not (folder / name).is_file()]


def _moe_tensors(
    dense: dict[str, torch.Tensor], gates: list[torch.Tensor], experts: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the MoE under its Mixtral name: an FFN becomes ``experts`` equal ones behind a gate."""
    for name, tensor in dense.items():
        layer, ffn, projection = name.removesuffix(".weight").rpartition(".mlp.")
        if not ffn:
            yield name, tensor
            continue
        for expert in range(experts):
            yield f"{layer}.block_sparse_moe.experts.{expert}.{EXPERT_WEIGHTS[projection]}.weight", tensor
    for i, gate in enumerate(gates):
        yield f"model.layers.{i}.block_sparse_moe.gate.weight", gate


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
