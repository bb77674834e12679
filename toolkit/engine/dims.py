"""ParallelDims: the degrees of one worker, their relations and the coordinates of a rank. No torch.

Layout and formulas are SGLang's: ranks are tp-fastest, tp_size = attn_tp * dp_size = moe_tp * ep_size * moe_dp_size.
It does not know model shapes (``arch_check.py`` does) nor process groups (``parallel.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.config.parallel import ParallelConfig


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of parallelism of one worker; build with ``of``, which validates."""

    tp_size: int
    dp_size: int
    ep_size: int
    moe_dp_size: int
    moe_dense_tp_size: int | None
    enable_dp_lm_head: bool = False

    @property
    def attn_tp(self) -> int:
        """Ranks that share one attention DP group's heads and KV cache."""
        return self.tp_size // self.dp_size

    @property
    def moe_group(self) -> int:
        """Ranks that hold one whole set of experts: ep_size * moe_tp."""
        return self.tp_size // self.moe_dp_size

    @property
    def moe_tp(self) -> int:
        """Ranks that split each expert's FFN."""
        return self.moe_group // self.ep_size

    @property
    def dense_tp(self) -> int:
        """Ranks that split a dense FFN."""
        return self.moe_dense_tp_size or self.tp_size

    @property
    def head_tp(self) -> int:
        """Ranks that split the vocabulary of the LM head."""
        return self.attn_tp if self.enable_dp_lm_head else self.tp_size

    @property
    def mapping(self) -> str:
        """Short name: DEP=n, TEP=n, TP=n, or the degrees."""
        n = self.tp_size
        if self.moe_dp_size == 1:
            if (self.dp_size, self.ep_size) == (n, n) and n > 1:
                return f"DEP={n}"
            if (self.dp_size, self.ep_size) == (1, n) and n > 1:
                return f"TEP={n}"
            if (self.dp_size, self.ep_size) == (1, 1):
                return f"TP={n}"
        return f"tp{n}-dp{self.dp_size}-ep{self.ep_size}-moedp{self.moe_dp_size}"

    def attn_tp_rank(self, rank: int) -> int:
        return rank % self.attn_tp

    def dp_rank(self, rank: int) -> int:
        return rank // self.attn_tp

    def leader(self, dp_rank: int) -> int:
        """The rank of a DP group that talks to the frontend."""
        return dp_rank * self.attn_tp

    def dp_group(self, dp_rank: int) -> range:
        """The ranks of a DP group, its leader first."""
        return range(self.leader(dp_rank), self.leader(dp_rank) + self.attn_tp)

    def moe_dp_rank(self, rank: int) -> int:
        return rank // self.moe_group

    def ep_rank(self, rank: int) -> int:
        return rank % self.moe_group // self.moe_tp

    def moe_tp_rank(self, rank: int) -> int:
        return rank % self.moe_tp

    @classmethod
    def of(cls, config: ParallelConfig) -> ParallelDims:
        """Validated degrees. Raises ``ValueError`` that names field, value, rule and way out."""
        c = config
        for name in ("tp_size", "dp_size", "ep_size", "moe_dp_size"):
            if getattr(c, name) < 1:
                raise ValueError(f"parallel.{name}={getattr(c, name)} must be at least 1: use 1 to do without")
        if c.tp_size % c.dp_size:
            raise ValueError(
                f"parallel.dp_size={c.dp_size} does not divide parallel.tp_size={c.tp_size}: "
                f"use one of {_divisors(c.tp_size)}"
            )
        if c.dp_size > 1 and not c.enable_dp_attention:
            raise ValueError(
                f"parallel.dp_size={c.dp_size} needs parallel.enable_dp_attention=true "
                "(attention DP inside one worker): use both, or dp_size=1"
            )
        if c.tp_size % c.moe_dp_size:
            raise ValueError(
                f"parallel.moe_dp_size={c.moe_dp_size} does not divide parallel.tp_size={c.tp_size}: "
                f"use one of {_divisors(c.tp_size)}"
            )
        group = c.tp_size // c.moe_dp_size
        if group % c.ep_size:
            raise ValueError(
                f"parallel.ep_size={c.ep_size} does not divide tp_size / moe_dp_size = {group}: "
                f"use one of {_divisors(group)}"
            )
        if c.moe_dense_tp_size not in (None, 1):
            raise ValueError(
                f"parallel.moe_dense_tp_size={c.moe_dense_tp_size} is neither null nor 1: use null (dense FFN split "
                "over tp_size) or 1 (dense FFN data-parallel)"
            )
        if c.enable_dp_lm_head and not c.enable_dp_attention:
            raise ValueError(
                "parallel.enable_dp_lm_head=true needs parallel.enable_dp_attention=true: use both, or neither"
            )
        return cls(c.tp_size, c.dp_size, c.ep_size, c.moe_dp_size, c.moe_dense_tp_size, c.enable_dp_lm_head)


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
