"""What GPU backends decide without a GPU: the way of a step, the environment, the order of compilation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.engine import gpu_libraries
from toolkit.engine.arch import read_arch
from toolkit.engine.fp8 import BlockFp8
from toolkit.engine.gpu_libraries import compiling, import_gpu_library, prepare
from toolkit.engine.linear_warm_up import warm_up_linears
from toolkit.engine.moe.deepep import DeepEPDispatcher, expected_rows, low_latency_rows
from toolkit.engine.moe.dispatch import Dispatched, ExpertShape, StepRows
from toolkit.engine.moe.gemm import ExpertWeights, TorchGemm
from toolkit.engine.moe.warm_up import warm_up

SHAPE = ExpertShape(
    8, 0, 2, hidden=16, top_k=2, alignment=128, decode_alignment=64, max_rows=512, max_decode_rows=64
)  # fmt: skip


@pytest.mark.parametrize(("rows", "is_extend", "both", "normal", "low_latency"), [
    ((3, 64), False, "low_latency", "normal", "low_latency"),
    ((3, 65), False, "normal", "normal", "low_latency"),
    ((3, 4), True, "normal", "normal", "low_latency"),
    ((0, 0), False, "low_latency", "normal", "low_latency"),
])  # fmt: skip
def test_the_way_follows_what_all_ranks_know(
    rows: tuple[int, ...], is_extend: bool, both: str, normal: str, low_latency: str
) -> None:
    step, some = StepRows(rows, is_extend), SimpleNamespace(masked=True)
    for ways, wanted in ((("normal", "low_latency"), both), (("normal",), normal), (("low_latency",), low_latency)):
        transports: Any = dict.fromkeys(ways, some)
        dispatcher = DeepEPDispatcher(transports, {"normal": 512, "low_latency": 64})
        assert dispatcher.way(step) == wanted
        assert dispatcher.capturable(step) == (wanted == "low_latency")
        assert dispatcher.masked == ("low_latency" in ways)


def test_room_of_the_low_latency_way() -> None:
    assert low_latency_rows(EngineConfig(), SHAPE) == 64
    assert low_latency_rows(EngineConfig(deepep_mode="low_latency"), SHAPE) == 512
    assert low_latency_rows(EngineConfig(deepep_num_max_dispatch_tokens_per_rank=7), SHAPE) == 7
    assert expected_rows(StepRows((3, 6), False), SHAPE) == 3  # 9 rows, 2 experts each, 8 slots
    assert expected_rows(StepRows((0, 0), False), SHAPE) == 1


def test_the_environment_is_set_where_the_user_has_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WIDEEP_CACHE", str(tmp_path))
    environment = {"EP_JIT_CACHE_DIR": "/mine"}
    changed = prepare(environment, rdma=False)
    assert changed == {"DG_JIT_CACHE_DIR": str(tmp_path / "jit" / "deep_gemm"), "EP_DISABLE_GIN": "1"}
    assert environment == changed | {"EP_JIT_CACHE_DIR": "/mine"}
    assert "EP_DISABLE_GIN" not in prepare({}, rdma=True), "RDMA between hosts needs it"


def test_rdma_is_what_the_kernel_lists(tmp_path: Path) -> None:
    assert not gpu_libraries.has_rdma(tmp_path / "none") and not gpu_libraries.has_rdma(tmp_path)
    (tmp_path / "mlx5_0").mkdir()
    assert gpu_libraries.has_rdma(tmp_path)


def test_a_library_that_is_not_there_names_setting_and_extra() -> None:
    with pytest.raises(ValueError, match=r"a.b=c needs the library no_such_library.*toolkit\[gpu\]"):
        import_gpu_library("no_such_library", "a.b=c")


def test_every_shape_is_run_once_with_no_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ranks begin at different shapes, all run all of them, and progress reaches the end."""
    monkeypatch.setenv("WIDEEP_CACHE", str(tmp_path))

    class Recording(TorchGemm):
        def shapes(self, most: int, alignment: int) -> Any:
            return iter([alignment, most])

        def __call__(self, rows: Dispatched) -> torch.Tensor:
            assert not rows.counts.any() and not rows.ends.any()
            seen.append((rows.layout, rows.expected, rows.alignment))
            return super().__call__(rows)

    gemm, experts = Recording(), ExpertWeights(torch.randn(4, 8, 16), torch.randn(4, 16, 4))
    gemm.pack(experts)
    orders = []
    for where in (0.0, 0.5):
        seen: list[tuple[str, int, int]] = []
        told: list[tuple[int, int]] = []
        warm_up(gemm, experts, SHAPE, 2, where, True, lambda done, total, told=told: told.append((done, total)))
        orders.append(seen)
        assert told == [(n, 6) for n in range(1, 7)]
    most, decode = 512 * 2 * 2 // 8, 64 * 2 * 2 // 8
    assert set(orders[0]) == set(orders[1]) and orders[0][0] != orders[1][0]
    assert orders[0] == [
        ("contiguous", 128, 128), ("contiguous", most, 128), ("contiguous", 64, 64), ("contiguous", decode, 64),
        ("masked", 64, 64), ("masked", decode, 64),
    ]  # fmt: skip
    seen = []
    warm_up(gemm, experts, SHAPE, 2, 0.0, False, lambda done, total: None)
    assert seen == orders[0][:4], "no masked layout where no dispatcher brings it"


def test_every_number_of_tiles_of_the_models_fp8_matrices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The matrices are found in a real model: attention, dense layers and shared experts, each shape once."""
    from tests.gpu.moe_layers import FAMILIES
    from toolkit.engine.models.base import make_model
    from toolkit.engine.moe.layer import MoEContext
    from toolkit.engine.parallel import Groups
    from toolkit.engine.weights import DummyWeights

    monkeypatch.setenv("WIDEEP_CACHE", str(tmp_path))
    config = FAMILIES["deepseek_v3"] | {
        "hidden_size": 256,
        "q_lora_rank": 128,
        "v_head_dim": 128,
        "qk_nope_head_dim": 96,
    }
    arch = read_arch(ModelConfig(hf_config=config, load_format="dummy"))
    context = MoEContext.create(arch, EngineConfig(moe_a2a_backend="allgather"), Groups.single(), "cpu")
    weights = DummyWeights(0, torch.bfloat16, "cpu", keep_fp8=True)
    model = make_model(arch, weights, Groups.single(), context, "cpu")
    seen: list[tuple[int, tuple[int, ...]]] = []
    told: list[tuple[int, int]] = []

    def multiply(x: torch.Tensor, matrix: BlockFp8) -> torch.Tensor:
        seen.append((len(x), tuple(matrix.weight_NK.shape)))
        return x @ matrix.dequantize(torch.bfloat16).T

    warm_up_linears(model, 130, 0.5, lambda done, total: told.append((done, total)), multiply)
    shapes = {
        (128, 256), (512, 128), (256, 512),  # q_a; q_b, 4 heads of 128; o
        (1024, 256), (512, 256), (256, 256),  # dense gate and up; shared gate and up, down
    }  # fmt: skip
    assert {shape for _, shape in seen} == shapes
    assert sorted({rows for rows, _ in seen}) == [16, 32, 64, 128, 192]
    assert len(seen) == 5 * len(shapes) and told == [(n, 5) for n in range(1, 6)]
    warm_up_linears(object(), 130, 0.0, lambda done, total: pytest.fail("there is nothing to compile"))


def test_one_rank_of_a_node_compiles_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import fcntl

    monkeypatch.setenv("WIDEEP_CACHE", str(tmp_path))
    with compiling("a"), (tmp_path / "jit" / "locks" / "a.lock").open("w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / "jit" / "locks" / "a.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
