"""Gate weights that give a chosen, uneven expert load on real prompts.

Mixtral's gate has no bias, so how popular an expert is must come from its row alone. A row is the sum of two parts:

- a random direction, cleared of its mean and scaled to unit spread over the tokens: which tokens like the expert;
- a multiple of the one direction on which every activation projects to about one (ridge regression): how
  many like it. These multiples are solved for by iteration until the load of each expert meets its target.

It knows activations and loads, not files nor model formats. Read next: ``demo_checkpoint.py``.

Shape suffixes: L layers, T tokens, D hidden, E experts, H heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

FIT_STEPS = 200
RIDGE = 0.1  # of the mean activation variance; larger generalises better and projects less evenly


@dataclass(frozen=True)
class LayerFit:
    """One layer's gate, rounded to bfloat16, and what it does. Loads are shares of all assignments and sum to one."""

    gate_ED: torch.Tensor
    fit_load: list[float]
    held_out_load: list[float]


def zipf_load(experts: int, skew: float) -> torch.Tensor:
    """Target load [E], hottest first: a Zipf law, rank^-s, whose hottest expert has ``skew`` times the mean."""
    rank_E = torch.arange(1, experts + 1, dtype=torch.float64)
    low, high = 0.0, 16.0
    for _ in range(60):
        exponent = (low + high) / 2
        load_E = rank_E**-exponent / (rank_E**-exponent).sum()
        low, high = (exponent, high) if load_E[0] * experts < skew else (low, exponent)
    return load_E.float()


def fit_layer(
    fit_TD: torch.Tensor, held_out_TD: torch.Tensor, target_E: torch.Tensor, top_k: int, seed: int
) -> LayerFit:
    """Fits the gate of one layer to the MoE inputs ``fit_TD``; ``seed`` decides which expert gets which load."""
    generator = torch.Generator().manual_seed(seed)
    target_E = target_E[torch.randperm(len(target_E), generator=generator)]
    gate_ED = _fit_gate(fit_TD, target_E, top_k, generator).to(torch.bfloat16)
    return LayerFit(gate_ED, load_of(gate_ED, fit_TD, top_k).tolist(), load_of(gate_ED, held_out_TD, top_k).tolist())


def load_of(gate_ED: torch.Tensor, x_TD: torch.Tensor, top_k: int) -> torch.Tensor:
    """Share [E] of the (token, expert) assignments that each expert gets."""
    return _top_k_load(x_TD @ gate_ED.float().T, top_k)


def _top_k_load(logits_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    tokens, experts = logits_TE.shape
    chosen_TK = logits_TE.topk(top_k, dim=-1).indices
    return torch.bincount(chosen_TK.flatten(), minlength=experts) / (tokens * top_k)


def _fit_gate(x_TD: torch.Tensor, target_E: torch.Tensor, top_k: int, generator: torch.Generator) -> torch.Tensor:
    tokens, hidden = x_TD.shape
    moment_DD = x_TD.T @ x_TD / tokens
    ridge_DD = RIDGE * moment_DD.diagonal().mean() * torch.eye(hidden)
    ones_D = torch.linalg.solve(moment_DD + ridge_DD, x_TD.mean(0))
    ones_D /= (x_TD @ ones_D).mean()

    taste_ED = torch.randn(len(target_E), hidden, generator=generator)
    taste_ED -= (x_TD @ taste_ED.T).mean(0)[:, None] * ones_D
    taste_ED /= (x_TD @ taste_ED.T).std(0)[:, None]

    taste_TE, ones_T1 = x_TD @ taste_ED.T, (x_TD @ ones_D)[:, None]
    popularity_E = torch.zeros(len(target_E))
    floor = 1 / (tokens * top_k)  # one assignment: keeps the logarithm finite
    step = 1.0
    for _ in range(FIT_STEPS):
        load_E = _top_k_load(taste_TE + ones_T1 * popularity_E, top_k)
        popularity_E += step * (target_E.clamp_min(floor).log() - load_E.clamp_min(floor).log())
        step = max(step * 0.97, 0.02)  # large steps find the place, small ones settle there
    gate_ED: torch.Tensor = taste_ED + popularity_E[:, None] * ones_D
    return gate_ED


# --- the dense model's activations --------------------------------------------------------------------


def new_positions(prompts: list[list[int]]) -> list[torch.Tensor]:
    """Of each prompt, the positions whose prefix no earlier prompt has.

    Positions with a known prefix have the same activations, and a prefix cache computes them only once.
    """
    seen: set[tuple[int, ...]] = set()
    positions = []
    for ids in prompts:
        prefixes = [tuple(ids[: i + 1]) for i in range(len(ids))]
        positions.append(torch.tensor([i for i, prefix in enumerate(prefixes) if prefix not in seen], dtype=torch.long))
        seen.update(prefixes)
    return positions


def moe_inputs(
    config: dict[str, Any], weights: dict[str, torch.Tensor], prompts: Iterable[list[int]]
) -> Iterator[torch.Tensor]:
    """Runs the dense model over each prompt in float32; yields what its FFNs see, [L, T, D]."""
    weights32 = {name: value.float() for name, value in weights.items()}
    for ids in prompts:
        yield _forward(config, weights32, torch.tensor(ids))


@torch.inference_mode()
def _forward(config: dict[str, Any], weights: dict[str, torch.Tensor], ids_T: torch.Tensor) -> torch.Tensor:
    eps, width_d = config["rms_norm_eps"], config["head_dim"]
    frequency = config["rope_theta"] ** -(torch.arange(0, width_d, 2) / width_d)
    angle_Td = torch.outer(torch.arange(len(ids_T)), frequency).repeat(1, 2)
    cos_Td, sin_Td = angle_Td.cos(), angle_Td.sin()
    x_TD = weights["model.embed_tokens.weight"][ids_T]
    seen = []
    for layer in range(config["num_hidden_layers"]):
        w = {name: weights[f"model.layers.{layer}.{name}.weight"] for name in _LAYER_WEIGHTS}
        h_TD = F.rms_norm(x_TD, x_TD.shape[-1:], w["input_layernorm"], eps)
        q_HTd, k_HTd, v_HTd = (
            (h_TD @ w[f"self_attn.{p}_proj"].T).unflatten(-1, (-1, width_d)).transpose(0, 1) for p in "qkv"
        )
        q_HTd, k_HTd = _rotate(q_HTd, cos_Td, sin_Td), _rotate(k_HTd, cos_Td, sin_Td)
        a_HTd = F.scaled_dot_product_attention(q_HTd, k_HTd, v_HTd, is_causal=True, enable_gqa=True)
        x_TD = x_TD + a_HTd.transpose(0, 1).flatten(1) @ w["self_attn.o_proj"].T
        h_TD = F.rms_norm(x_TD, x_TD.shape[-1:], w["post_attention_layernorm"], eps)
        seen.append(h_TD)
        x_TD = x_TD + (F.silu(h_TD @ w["mlp.gate_proj"].T) * (h_TD @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
    return torch.stack(seen)


def _rotate(x_HTd: torch.Tensor, cos_Td: torch.Tensor, sin_Td: torch.Tensor) -> torch.Tensor:
    first, second = x_HTd.chunk(2, dim=-1)
    return x_HTd * cos_Td + torch.cat((-second, first), dim=-1) * sin_Td


_LAYER_WEIGHTS = (
    *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
