"""Pool: how far back to count, so that an imbalance can be told from noise and drift is still followed.

Knows nothing of placements. Read next: ``online.py``.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Pool:
    """The newest windows of counts that together are enough to tell an imbalance from noise.

    One large window is used alone, so that drift is followed at once; small ones are added up.

    Args:
        tolerance: the imbalance that matters, as in ``Rules``.
        gpus: GPUs that share a layer's assignments.
        windows: at most so many are kept.
    """

    def __init__(self, tolerance: float, gpus: int, windows: int = 64) -> None:
        # A GPU's count n has the standard deviation sqrt(n): it is within tolerance / 2 from n = (2 / tolerance)^2.
        self.enough = gpus * (2.0 / tolerance) ** 2
        self._windows: deque[Ints] = deque(maxlen=windows)

    def __bool__(self) -> bool:
        return bool(self._windows)

    def add(self, counts_LE: Ints) -> None:
        """Takes the counts of a window that has just ended."""
        self._windows.append(counts_LE)

    def counts(self) -> Ints:
        """Sum of the newest windows, as many as are needed for ``enough`` assignments in the layers that carry load."""
        assert self._windows, "no window was added"
        total = np.zeros_like(self._windows[-1])
        for window in reversed(self._windows):
            total = total + window
            loaded = total.sum(1)
            if loaded.any() and loaded[loaded > 0].min() >= self.enough:
                break
        return total
