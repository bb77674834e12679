"""All legal mappings of some ranks, one after another in the same processes."""

from __future__ import annotations

import functools
import itertools
import traceback
from collections.abc import Iterator

from tests.dist.cases import Case, check_close, engine
from tests.dist.forced import forced_logits
from toolkit.config.parallel import ParallelConfig
from toolkit.engine.arch import Arch, read_arch
from toolkit.engine.arch_check import check
from toolkit.engine.dims import ParallelDims
from toolkit.engine.parallel import Comm, Groups

SEQUENCES, PROMPT, LENGTH = 3, 6, 8


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def mappings(world: int, arch: Arch, pairs: bool) -> Iterator[tuple[ParallelConfig, str]]:
    """Every (degrees, dispatcher) that the relations of SGLang allow; what a model cannot tell apart, once.

    Where both ways to split a dense FFN are tried, so are both ways to split the LM head.

    Args:
        pairs: every degree of attention with every degree of experts; else each of both, in turn.
    """
    experts = [(1, 1)]
    if arch.moe_layers:
        experts = [(moe_dp, ep) for moe_dp in divisors(world) for ep in divisors(world // moe_dp)]
    dense = (None, 1) if len(arch.moe_layers) < arch.num_layers else (None,)
    both = itertools.product(divisors(world), experts) if pairs else zip(itertools.cycle(divisors(world)), experts)
    for (dp, (moe_dp, ep)), dense_tp in itertools.product(both, dense):
        dp_head = dp > 1 and dense_tp == 1
        parallel = ParallelConfig(
            world, dp, ep, moe_dp, dense_tp, enable_dp_attention=dp > 1, enable_dp_lm_head=dp_head
        )
        yield parallel, "allgather"
        if arch.moe_layers and ep == world // moe_dp:
            yield parallel, "all_to_all"


def all_mappings(groups: Groups, case: Case, pairs: bool) -> list[str]:
    """Runs every mapping on ranks that are connected already -> what went wrong on this rank."""
    failures = []
    world, rank = groups.dims.tp_size, groups.rank
    split = functools.cache(lambda size, backend: Comm.split(world, rank, size, backend))
    arch, padding = read_arch(case.model), ""
    for parallel, backend in mappings(world, arch, pairs or not arch.moe_layers):
        padding = "sum_len" if padding == "max_len" else "max_len"  # in turn
        dims = ParallelDims.of(parallel)
        options = engine(moe_a2a_backend=backend, dp_padding_mode=padding, chunked_prefill_size=8)
        assert check(arch, dims, options) == []
        found = forced_logits(Groups.of(dims, rank, split), case.model, options, case.sequences, PROMPT)
        mine = [i for i in range(len(case.sequences)) if i % dims.dp_size == dims.dp_rank(rank)]
        try:
            assert sorted(found) == mine
            for i, rows in found.items():
                check_close(rows, case.expected[i], PROMPT)
        except AssertionError:
            failures.append(f"{parallel} {backend} {padding}: {traceback.format_exc(limit=1)}")
    return failures
