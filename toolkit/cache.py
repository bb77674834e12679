"""Where the toolkit keeps what is made once for all runs: compiled C and kernels, the demo model.

One folder for all processes of a user on a node. Nothing in it is needed: what is missing is made again.
"""

from __future__ import annotations

import os
from pathlib import Path

CACHE_ENV = "WIDEEP_CACHE"


def cache_dir() -> Path:
    """``$WIDEEP_CACHE``, or ``~/.cache/wideep-toolkit``; it need not exist."""
    return Path(os.environ.get(CACHE_ENV) or "~/.cache/wideep-toolkit").expanduser()
