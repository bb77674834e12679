"""``python -m toolkit.engine.eplb``: plans placements from expert counts, without an engine."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

EPILOG = """\
Counts come from experts.npz of a run folder, from a dump of SGLang's recorder (.pt), from JSON with
logical_count, or from an .npz with one array, [layers, experts] or [windows, layers, experts]. A slot (physical
expert) holds one expert; with 256 experts, 288 slots leave 32 for second copies of what is hot. Balancedness is
mean / max of the GPUs' loads, averaged over layers: a MoE layer waits for its busiest GPU, so 0.5 means that the
others idle half of the time. The bound is proven: no placement can be above it.

examples:
  python -m toolkit.engine.eplb plan results/smoke/latest/experts.npz --slots 12 --gpus 4
  python -m toolkit.engine.eplb plan dump.pt --slots 288 --gpus 32 --nodes 4 --groups 8 --out placement.json
  python -m toolkit.engine.eplb plan dump.pt --slots 288 --gpus 32 --out sglang.pt --out trtllm.yaml
  python -m toolkit.engine.eplb curve dump.pt --gpus 16 32 72 --redundant 0 16 32 64 --png curve.png
  python -m toolkit.engine.eplb bench

policies:
  auto          hierarchical where --nodes divides --groups, else global (DeepSeek's rule)
  global        any copy on any GPU: best balance
  hierarchical  the experts of a group on one node: least traffic between nodes, for group-limited gates (prefill)
  spill         one copy of each on its group's node, redundant ones anywhere: in between
  deepseek      DeepSeek's algorithm, to compare with
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 when an option is wrong."""
    options = _parser().parse_args(arguments)
    try:
        text = options.run(options)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{text}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.engine.eplb",
        description="Expert placements that balance the GPUs of an expert-parallel MoE.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    planner = commands.add_parser("plan", help="a placement from counts", epilog=EPILOG, formatter_class=raw)
    planner.add_argument("--slots", type=int, required=True, help="slots of all GPUs together")
    planner.add_argument("--gpus", type=int, required=True, help="GPUs (EP ranks)")
    planner.add_argument("--prev", default="", help="placement in force (.json, .pt): keep experts where they are")
    planner.add_argument(
        "--out", type=Path, action="append", default=[], metavar="FILE",
        help="write it: .json (ours, SGLang), .pt (SGLang), .yaml (TensorRT-LLM); may be given several times",
    )  # fmt: skip
    planner.add_argument("--layer-updates-per-iter", type=int, default=0, help=".yaml: 0 static, more: online")
    planner.set_defaults(run=_plan)
    curve = commands.add_parser("curve", help="balancedness against slots and GPUs", epilog=EPILOG, formatter_class=raw)
    curve.add_argument("--gpus", type=int, nargs="+", required=True)
    curve.add_argument("--redundant", type=int, nargs="+", default=[0, 16, 32, 64, 128], help="beyond one of each")
    curve.add_argument("--png", type=Path, help="draw it, too")
    curve.set_defaults(run=_curve)
    for command in (planner, curve):
        command.add_argument("counts", type=Path, help="experts.npz, dump.pt, JSON or a plain .npz")
        command.add_argument("--nodes", type=int, default=1, help="nodes the GPUs are on (default 1)")
        command.add_argument("--groups", type=int, default=1, help="expert groups of the gate (default 1: none)")
        command.add_argument("--policy", default="auto", help="see below (default auto)")
    bench = commands.add_parser("bench", help="balance and time against DeepSeek's EPLB", formatter_class=raw)
    bench.add_argument("--data", type=Path, default=None, help="folder with measured expert counts (optional)")
    bench.set_defaults(run=_bench)
    return parser


def _plan(options: argparse.Namespace) -> str:
    from toolkit.engine.eplb import formats, maps
    from toolkit.engine.eplb.planner import plan
    from toolkit.engine.eplb.relabel import moved

    counts = formats.read_counts(options.counts)
    load, layers, gpus, slots = counts.load_LE, counts.layer_ids, options.gpus, options.slots
    experts = load.shape[1]
    prev = formats.read_placement(options.prev, layers, experts, slots, gpus) if options.prev else None
    ask = (slots, options.groups, options.nodes, gpus)
    plan(load, *ask, prev, options.policy)  # compiles, or reads what was compiled
    begin = time.perf_counter()
    planned = plan(load, *ask, prev, options.policy)
    took = time.perf_counter() - begin
    before = prev if prev is not None else formats.read_placement("trivial", layers, experts, slots, gpus)
    was = maps.balancedness(maps.gpu_loads(load, before, gpus))
    lines = [
        f"{len(load)} layers, {experts} experts, {slots} slots on {gpus} GPUs, {int(load.sum())} assignments",
        f"policy {planned.policy}, {1e3 * took:.1f} ms",
    ]
    if not load.any():
        lines.append("the counts are all zero: redundant slots are spread evenly, and nothing can be said of balance")
    else:
        worst = int(np.nanargmax(planned.gap_L))
        lines += [
            _balance("in force" if prev is not None else "trivial", was),
            _balance("planned", planned.balancedness_L),
            _balance("bound", planned.bound_L),
            f"furthest from its bound: layer {layers[worst]}, {100 * planned.gap_L[worst]:.2f} %",
        ]
    if planned.policy == "spill":
        lines.append(f"load away from the home node: {100 * planned.off_home_L.mean():.1f} %")
    if prev is not None:
        lines.append(
            f"slots that need another expert: {int(moved(prev, planned.phy2log_LR, gpus).sum())} of {prev.size}"
        )
    used = (
        load.sum(1) > 0 if load.any() else np.ones(len(load), bool)
    )  # TensorRT-LLM lists MoE layers only; SGLang's dumps have rows for all
    for out in options.out:
        rows = used if out.suffix in (".yaml", ".yml") else np.ones(len(load), bool)
        ids = [layer for layer, keep in zip(layers, rows) if keep]
        formats.write_placement(out, planned.phy2log_LR[rows], ids, options.layer_updates_per_iter)
        lines.append(f"written: {out}")
    return "\n".join(lines)


def _balance(what: str, balancedness_L: NDArray[np.float64]) -> str:
    from toolkit.engine.eplb.maps import mean_balancedness

    return f"balancedness {what}: {mean_balancedness(balancedness_L):.4f}"


def _curve(options: argparse.Namespace) -> str:
    from toolkit.engine.eplb import curve, formats

    load = formats.read_counts(options.counts).load_LE
    experts = load.shape[1]
    points = curve.curve(load, experts, options.gpus, options.redundant, options.groups, options.nodes, options.policy)
    text = curve.table(points, experts)
    if options.png:
        curve.draw(points, options.png, options.counts.name)
        text += f"\nwritten: {options.png}"
    return text


def _bench(options: argparse.Namespace) -> str:
    from toolkit.engine.eplb.bench import table

    return table(options.data)


if __name__ == "__main__":
    sys.exit(main())
