"""What each mode of the expert recorder costs of a decode step, on one CPU rank; or what it adds to a CUDA graph.

    python -m tests.bench.recorder [--rows 8]
    python -m tests.bench.recorder --device cuda

A model with the demo's layers (hidden 576, 8 experts, top 2) decodes without a recorder; its ids of one pass are then
given to a recorder of each mode again and again, exactly as the layers give them, windows and their sums included.
CPU time of the process, rounds of the modes interleaved; prints microseconds a pass, their spread, and the share of the
step. The thread that sums windows is counted in. Below, the same calls at DeepSeek-V3's size (58 layers, 256 experts).
On a GPU: time of a graph that holds the counting of all layers of a decode step, as one kernel a layer and as the torch
calls that it stands for, by the device's clock; steps beside which to see it are in docs/performance.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from toolkit.config.engine import EngineConfig
from toolkit.config.model import ModelConfig
from toolkit.engine.arch import read_arch
from toolkit.engine.core import Batch, SamplingParams, StepContext
from toolkit.engine.eplb.history import History
from toolkit.engine.eplb.placement import Placement
from toolkit.engine.eplb.recorder import Recorder
from toolkit.engine.eplb.setup import make_recorder
from toolkit.engine.kv.tables import BlockTables
from toolkit.engine.moe.layer import MoEContext
from toolkit.engine.parallel import Groups
from toolkit.engine.runner import ModelRunner
from toolkit.engine.scheduler import Scheduler

MODES = ("stat", "stat_approx", "per_pass", "per_token")
LAYERS, PASSES, ROUNDS = 6, 40, 9
DEMO = {
    "model_type": "mixtral", "vocab_size": 1024, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": LAYERS, "num_attention_heads": 9, "num_key_value_heads": 3, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 1e5,
    "tie_word_embeddings": True, "sliding_window": None, "hidden_act": "silu",
}  # fmt: skip


def decode_steps(rows: int) -> float:
    """CPU microseconds of a decode step of ``rows`` requests without a recorder, the best of several rounds."""
    model = ModelConfig(name="demo", hf_config=dict(DEMO), load_format="dummy", dtype="float32")
    engine = EngineConfig(moe_a2a_backend="allgather", max_total_tokens=rows * 512, max_running_requests=rows)
    runner = ModelRunner(model, read_arch(model), engine, Groups.single(), "cpu")
    tables = BlockTables(runner.cache.kinds, engine.page_size, prefix_cache=False)
    scheduler = Scheduler(tables, engine.chunked_prefill_size, rows, 2048)
    for i in range(rows):
        scheduler.add(f"r{i}", [i + 1] * 16, SamplingParams(max_tokens=1 << 20))

    def step() -> None:
        batch = scheduler.schedule()
        ctx = StepContext(0, (batch.num_tokens,), (batch.num_logit_rows,), bool(batch.prefill))
        sampled = runner.step(batch, ctx)
        scheduler.finish(batch, sampled.tokens, sampled.logprobs)

    step()
    return min(cpu_us(lambda: [step() for _ in range(8)], 8) for _ in range(4))


def recorder(mode: str, layers: int, experts: int, top_k: int, folder: Path) -> Recorder:
    """A recorder as a rank makes it, alone on one rank."""
    hf = DEMO | {"num_hidden_layers": layers, "num_local_experts": experts, "num_experts_per_tok": top_k}
    arch = read_arch(ModelConfig(name="demo", hf_config=hf, load_format="dummy"))
    engine = EngineConfig(expert_distribution_recorder_mode=mode, moe_a2a_backend="allgather")  # type: ignore[arg-type]
    moe = MoEContext.create(arch, engine, Groups.single(), "cpu")
    made = make_recorder(arch, moe, str(folder / f"{mode}-{experts}.npz"), "cpu")
    assert made is not None
    return made


def one_pass(made: Recorder, ids: list[torch.Tensor], placement: Placement) -> Callable[[], None]:
    """The calls of all layers in one pass."""
    slots = [placement.to_slots(layer, one) for layer, one in enumerate(ids)]
    counts = [torch.bincount(one.flatten(), minlength=placement.num_local) for one in slots]

    def run() -> None:
        made.begin_pass(Batch())
        for layer, (one, slot, count) in enumerate(zip(ids, slots, counts)):
            made.selected(layer, one, slot)
            made.received(layer, count)
        made.end_of_pass()

    return run


def cpu_us(call: Callable[[], object], times: int) -> float:
    begin = time.process_time()
    call()
    return (time.process_time() - begin) / times * 1e6


def costs(layers: int, experts: int, top_k: int, rows: int, folder: Path) -> dict[str, list[float]]:
    """CPU microseconds a pass of each mode, a figure a round."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.rand(rows, experts, generator=generator).argsort(-1)[:, :top_k] for _ in range(layers)]
    made = {mode: recorder(mode, layers, experts, top_k, folder) for mode in MODES}
    calls = {mode: one_pass(made[mode], ids, made[mode].placement) for mode in MODES}
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(ROUNDS):
        for mode, call in calls.items():
            found[mode].append(cpu_us(lambda call=call: [call() for _ in range(PASSES)], PASSES))  # type: ignore[misc]
    for one in made.values():
        one.flush()
    return found


SHAPES = {"Qwen3-30B-A3B, 2 GPUs": (48, 128, 8, 72), "DeepSeek-V3, 32 GPUs": (58, 256, 8, 9)}
"""Layers, experts, top-k and slots of a rank."""


def graph_us(layers: int, experts: int, top_k: int, local: int, rows: int, by_ids: bool, fused: bool) -> list[float]:
    """Microseconds of the counting of a decode step, a figure a round of replays."""
    ranks = -(-experts // local)
    placement = Placement.trivial(layers, experts, local * ranks, 0, ranks, "cuda")
    history = History(tuple(range(layers)), experts, Groups.single().counts, 0, ranks, placement.phy2log_LP, None)
    made = Recorder(layers, placement, True, 1 << 30, history, "cuda", by_ids=by_ids)
    made._fused = fused
    ids = torch.rand(rows, experts, device="cuda").argsort(-1)[:, :top_k]
    received = torch.full((local,), rows * top_k // local, dtype=torch.int32, device="cuda")

    def count() -> None:
        for layer in range(layers):
            made.selected(layer, ids, ids)
            made.received(layer, received)

    count()
    made.stop()  # as while graphs are captured
    torch.cuda.synchronize()
    graph, begin, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.graph(graph):
        count()
    found = []
    for _ in range(ROUNDS + 1):
        begin.record()
        for _ in range(PASSES):
            graph.replay()
        end.record()
        end.synchronize()
        found.append(1e3 * begin.elapsed_time(end) / PASSES)
    return found[1:]


def on_gpu() -> None:
    for name, (layers, experts, top_k, local) in SHAPES.items():
        for rows in (32, 128, 256):
            cells = []
            for mode, by_ids in (("stat", True), ("stat_approx", False)):
                for fused in (True, False):
                    times = graph_us(layers, experts, top_k, local, rows, by_ids, fused)
                    low, high = min(times), max(times)
                    cells.append(
                        f"{mode}{'' if fused else ' in torch'} {statistics.median(times):.0f} ({low:.0f} to {high:.0f})"
                    )
            print(f"{name}, {layers} layers, {rows} rows, us a step: {', '.join(cells)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=8, help="requests that decode (default 8)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    rows = args.rows
    torch.set_num_threads(1)
    if args.device == "cuda":
        with torch.inference_mode():
            on_gpu()
        return 0
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        step = decode_steps(rows)
        print(f"decode step, {LAYERS} layers, {rows} rows: {step:.0f} us")
        for mode, values in costs(LAYERS, 8, 2, rows, Path(folder)).items():
            middle = statistics.median(values)
            print(f"{mode:12} {middle:8.1f} us a pass ({min(values):.1f} to {max(values):.1f}): {middle / step:.2%}")
        print("58 layers, 256 experts, top 8, 128 rows, on the host:")
        for mode, values in costs(58, 256, 8, 128, Path(folder)).items():
            print(f"{mode:12} {statistics.median(values):8.0f} us a pass ({min(values):.0f} to {max(values):.0f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
