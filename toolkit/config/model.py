"""``model.*``: what is served. Read next: ``engine/arch.py``, which knows the shapes behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from toolkit.config.options import opt


@dataclass(frozen=True)
class ModelConfig:
    """What is served."""

    name: str = opt("smollm2-moe", "served model name, the `model` of the OpenAI API")
    path: str = opt("", "Hugging Face folder: config.json, *.safetensors, tokenizer")
    build: str = opt("", "demo model to build into `path` when the folder is missing: smollm2_moe")
    hf_config: dict[str, Any] | None = opt(None, "config.json given inline, for load_format=dummy without a folder")
    tokenizer: str = opt("", "tokenizer folder; empty: `path`; `bytes`: built-in, one token a byte")
    load_format: Literal["auto", "dummy"] = opt("auto", "auto: read safetensors; dummy: seeded random weights")
    dtype: Literal["auto", "float32", "bfloat16"] = opt("auto", "weights and activations; auto: float32 on CPU")
    seed: int = opt(0, "seed of dummy weights")
