"""Operations of a layer that are one kernel on a GPU and a few torch calls elsewhere.

Each function has one meaning; ``supported`` says whether the tensors take the kernel. The torch versions, which CPU and
the tests compare with, are where they always were: in ``layers.py``, ``models/gqa.py``, ``moe/gate.py`` and
``eplb/recorder.py``.
Read next: ``kernels/chain.py``, ``kernels/norms.py``, ``kernels/attention.py``, ``kernels/gate.py``.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from toolkit.engine.layers import RMSNorm, Rotary
    from toolkit.engine.moe.gate import GroupedSigmoidGate


@cache
def _kernels() -> Any:
    """The kernels, or None where Triton is not installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    from toolkit.engine.kernels import attention, counting, gate, latent, linear, norms

    return {
        "attention": attention, "counting": counting, "gate": gate, "latent": latent, "linear": linear, "norms": norms,
    }  # fmt: skip


def supported(x: Tensor) -> bool:
    """Whether ``x`` is where the kernels run."""
    return x.is_cuda and _kernels() is not None


def rms_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    """``norm(x)``; x [..., size], rows contiguous."""
    out: Tensor = _kernels()["norms"].rms_norm(x, norm.weight, norm.eps, norm.add_one)
    return out


def add_rms_norm(x: Tensor, delta: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """(x + delta, norm(x + delta)); both [n, size]. ``delta`` may come in float32 parts [P, n, size]."""
    out: tuple[Tensor, Tensor] = _kernels()["norms"].add_rms_norm(x, delta, norm.weight, norm.eps, norm.add_one)
    return out


def rotate_and_write(
    qkv: Tensor,
    norms: tuple[RMSNorm, RMSNorm] | None,
    rotary: Rotary,
    positions_T: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows_T: Tensor,
) -> Tensor:
    """Norms and rotates queries and keys of qkv [T, H + 2 Hkv, dim], and stores keys and values at ``rows_T``.

    qkv may come in float32 parts [P, T, ..] to be added up.

    Returns:
        The queries [T, H, dim].
    """
    out: Tensor = _kernels()["attention"].rotate_and_write(qkv, norms, rotary, positions_T, k_cache, v_cache, rows_T)
    return out


def write_latent(kv: Tensor, norm: RMSNorm, rotary: Rotary, positions_T: Tensor, cache: Tensor, rows_T: Tensor) -> None:
    """Norms the latent of kv [T, C + R], rotates the rest in pairs, and stores both in ``cache`` at ``rows_T``."""
    _kernels()["latent"].write_latent(kv, norm, rotary, positions_T, cache, rows_T)


def rotate_pairs(x: Tensor, rotary: Rotary, positions_T: Tensor) -> None:
    """``rotary`` on x [T, H, R], in place; x may be a part of each head."""
    _kernels()["latent"].rotate_pairs(x, rotary, positions_T)


def softmax_route(
    x_SD: Tensor, weight_ED: Tensor, top_k: int, renormalize: bool, real: Tensor | None, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The ``top_k`` experts of each row by softmax, best first: ids int64 [S, K], weights float32 [S, K].

    Args:
        real: int32 [1]: rows from this one on are padding, their ids -1.
        table: int64 [E + 1]: also returns ``table[ids]``; -1 finds the last entry.
    """
    out: tuple[Tensor, Tensor, Tensor | None] = _kernels()["gate"].softmax_route(
        x_SD, weight_ED, top_k, renormalize, real, table
    )
    return out


def grouped_route(
    x_SD: Tensor, gate: GroupedSigmoidGate, real: Tensor | None, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``gate(x)``; the rest as ``softmax_route``."""
    out: tuple[Tensor, Tensor, Tensor | None] = _kernels()["gate"].grouped_route(x_SD, gate, real, table)
    return out


def partial_products(x: Tensor, weight_NK: Tensor, early: bool = False) -> Tensor | None:
    """x [n <= 64, K] times weight [N, K] transposed, bf16, as float32 parts [P, n, N]; None: not of such shapes.

    Args:
        early: read some of the weight while the kernel before ends.
    """
    out: Tensor | None = _kernels()["linear"].partial_products(x, weight_NK, early)
    return out


def lookup(table_E: Tensor, ids_SK: Tensor) -> Tensor:
    """``table_E[ids_SK]``, int64; -1 finds the last entry."""
    out: Tensor = _kernels()["gate"].lookup(table_E, ids_SK)
    return out


def count(ids: Tensor, counts_E: Tensor, rows_e: Tensor, received_e: Tensor) -> None:
    """Adds the ids [...] (-1: padding) to ``counts_E`` and ``rows_e`` to ``received_e``; both int64."""
    _kernels()["counting"].count(ids, counts_E, rows_e, received_e)
