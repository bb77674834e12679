"""PassLog: the recorder's modes per_pass and per_token: what single forward passes did, the newest of them.

Each rank keeps its own and writes its own file, in SGLang's format, when asked to. Bounded by passes. Copies to the
host wait for the device: these modes are for looking closely, not for production.
L: MoE layers, P: slots, S: rows of this rank's slice, K: top-k.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolkit.engine.core import Batch
from toolkit.engine.eplb.history import dump_path
from toolkit.records.files import replacing


class PassLog:
    """Passes of one rank.

    Args:
        slots: of a layer, on all ranks; this rank's are ``first_slot`` and those after it.
        keep: passes.
        tokens: keep the slots of every token, too (per_token).
        path: of experts.npz, beside which dumps go; None: nowhere.
    """

    def __init__(
        self, rank: int, layers: int, slots: int, first_slot: int, keep: int, tokens: bool, path: Path | None
    ) -> None:
        self._rank, self._layers, self._slots, self._first = rank, layers, slots, first_slot
        self._tokens, self._path = tokens, path
        self._records: deque[dict[str, Any]] = deque(maxlen=keep)
        self._now: dict[str, Any] = {}
        self._chosen: list[Tensor | None] = []
        self._passes = 0

    def begin(self, batch: Batch) -> None:
        """Before a pass: what its tokens are."""
        self._chosen = [None] * self._layers
        if not self._tokens:
            return
        positions = [position for s in batch.scheduled for position in range(s.begin, s.end)]
        tokens = [token for s in batch.scheduled for token in s.request.tokens[s.begin : s.end]]
        self._now = {
            "input_ids": torch.tensor(tokens, dtype=torch.int64),
            "positions": torch.tensor(positions, dtype=torch.int64),
            "extend_seq_lens": [s.num_tokens for s in batch.prefill],
            "forward_mode": "EXTEND" if batch.prefill else "DECODE" if batch.decode else "IDLE",
        }

    def selected(self, layer: int, slots_SK: Tensor) -> None:
        if self._tokens and self._chosen:
            self._chosen[layer] = slots_SK.clone()

    def end(self, received: Tensor | None) -> None:
        """After a pass: rows that this rank's slots received since the window began, [L, e]; windows have one pass."""
        counts = torch.zeros(self._layers, self._slots, dtype=torch.int64)
        if received is not None:
            counts[:, self._first : self._first + received.shape[1]] = received.cpu()
        record: dict[str, Any] = {
            "forward_pass_id": self._passes, "rank": self._rank, "gatherer_key": "primary",
            "global_physical_count": counts,
        }  # fmt: skip
        chosen = [slots for slots in self._chosen if slots is not None]
        if self._tokens and len(chosen) == self._layers:
            record |= self._now | {"topk_ids_of_layer": torch.stack(chosen).to(torch.int32).cpu()}
        self._records.append(record)
        self._passes += 1

    def dump(self, phy2log_LP: NDArray[np.int64]) -> str:
        """Writes what is kept, and forgets it; the file's name."""
        if self._path is None:
            return ""
        path = dump_path(self._path, self._rank)
        content = {"records": list(self._records), "last_physical_to_logical_map": torch.from_numpy(phy2log_LP.copy())}
        with replacing(path, "wb") as out:
            torch.save(content, out)
        self._records.clear()
        return f"{path.parent.name}/{path.name}"
