"""What the terminal shows: plain lines, and the plan: nodes, ranks, GPUs, ports, memory, every process's command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from toolkit.config.experiment import ExpConfig
from toolkit.config.load import LoadConfig
from toolkit.launch.launcher import ProcessSpec
from toolkit.launch.plan import DeploymentPlan
from toolkit.launch.pools import AGG

GB = 10**9


def say(console: Console, text: str) -> None:
    """A line as it is: no markup, no colours of numbers, no breaks."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show(
    console: Console,
    cfg: ExpConfig,
    plan: DeploymentPlan,
    specs: Sequence[ProcessSpec],
    memory: Mapping[str, Mapping[str, int]],
) -> None:
    """``memory``: bytes a rank by kind, of each pool."""
    unit = "GPUs" if plan.device == "cuda" else "CPU ranks"
    console.print(
        Text(
            f"{plan.exp}: {cfg.model.name}, {plan.mapping}, {plan.num_gpus} {unit} on {plan.num_nodes} "
            f"node{'s' if plan.num_nodes > 1 else ''} ({plan.launcher}), a2a {cfg.engine.moe_a2a_backend}, "
            f"http://{plan.frontend.client_host}:{plan.frontend.http_port}",
            style="bold",
        ),
        soft_wrap=True,
    )
    console.print(_ranks(plan), *(_memory(cfg, pool, by_kind) for pool, by_kind in memory.items()))
    console.print(_commands(specs), soft_wrap=True)
    console.print(
        f"Then: {_points(cfg.load)}, dataset {cfg.load.dataset}, osl {cfg.load.osl}; results under "
        f"{cfg.cluster.results_dir}/{cfg.exp}/",
        soft_wrap=True,
        highlight=False,
    )


def _points(load: LoadConfig) -> str:
    if load.arrival == "trace":
        return f"the trace {load.dataset_path}, {load.speedup:g} times as fast as recorded"
    if load.request_rate:
        return f"load points {', '.join(f'{rate:g}' for rate in load.request_rate)} (requests/s, {load.arrival})"
    return f"load points {', '.join(map(str, load.concurrency))} (concurrency)"


def _ranks(plan: DeploymentPlan) -> Table:
    device = "GPU" if plan.device == "cuda" else "local rank"
    columns = ("process", "node", device, "dp_rank", "attn_tp_rank", "ep_rank", "port")
    table = Table(*columns, title="Plan", title_justify="left", box=box.SIMPLE_HEAD)
    for worker in plan.workers:
        for r in worker.ranks:
            cells = (r.node, r.local_rank, r.dp_rank, r.attn_tp_rank, r.ep_rank, r.inbox_port)
            table.add_row(f"{worker.name}-{r.rank}", *map(str, cells))
    several = f" ({plan.frontend.api_servers} API servers)" if plan.frontend.api_servers > 1 else ""
    table.add_row(f"frontend-0{several}", str(plan.frontend.node), "", "", "", "", str(plan.frontend.http_port))
    others = (f"{port} {use}" for (_, port), use in plan.ports().items() if " inbox" not in use or "frontend" in use)
    table.caption = "Ports: " + ", ".join(others)
    table.caption_justify = "left"
    return table


def _memory(cfg: ExpConfig, pool: str, memory: Mapping[str, int]) -> Table | Text:
    if not memory:
        return Text("Memory per rank: known after the model is built")
    title = f"Memory per {'' if pool == AGG else f'{pool} '}rank ({cfg.model.dtype})"
    table = Table("kind", "GB", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for kind, size in memory.items():
        table.add_row(kind, f"{size / GB:.3f}")
    table.add_section()
    limit = f" of {cfg.cluster.gpu_memory_gb:g}" if cfg.cluster.gpu_memory_gb else ""
    table.add_row("total", f"{sum(memory.values()) / GB:.3f}{limit}")
    return table


def _commands(specs: Sequence[ProcessSpec]) -> Group:
    """Whole lines, not table cells: they are there to be copied. The environment is the same for all of an adapter."""
    lines = []
    for env in dict.fromkeys(tuple(spec.env.items()) for spec in specs):
        names = [spec.name for spec in specs if tuple(spec.env.items()) == env]
        lines.append(Text(f"Environment of {names[0]} ... {names[-1]}:", style="italic"))
        lines.append(Text(f"  {' '.join(f'{name}={shlex.quote(value)}' for name, value in env)}"))
    lines.append(Text("Commands:", style="italic"))
    lines += [Text(f"  {spec.name} (node {spec.node}): {shlex.join(spec.argv)}") for spec in specs]
    return Group(*lines)
