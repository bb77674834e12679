"""What ranks need of a case: the model's folder, sequences, and transformers' logits for them.

Apart from ``families.py``, so that a rank need not import transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig

VOCAB, LENGTH, PROMPT = 96, 22, 15


@dataclass(frozen=True)
class Case:
    """A saved model, token sequences, and transformers' logits [sequence, position, V] for them."""

    model: ModelConfig
    sequences: list[list[int]]
    expected: np.ndarray


def engine(**changes: object) -> EngineConfig:
    values = {"page_size": 4, "max_total_tokens": 256, "max_running_requests": 8, "chunked_prefill_size": 64}
    return EngineConfig(**(values | changes))  # type: ignore[arg-type]


def check_close(found: dict[int, np.ndarray], expected: np.ndarray, prompt: int = PROMPT) -> None:
    """Every position that was computed equals the oracle's; decode computes all of its own."""
    assert set(found) >= set(range(prompt - 1, len(expected)))
    for position, row in found.items():
        np.testing.assert_allclose(row, expected[position], rtol=0, atol=2e-5 * np.abs(expected).max())
