"""The launcher seam: what is started (``ProcessSpec``), what came of it (``ProcessState``), and the protocols.

A launcher says where the processes of a deployment can be and on which ports, starts them, reports each one's state,
and ends them all. It does not know what the processes are: adapters write their commands. Every process runs under
``rank.py``, on its own node. Implementations: ``local.py``, ``slurm.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from toolkit import records
from toolkit.config.experiment import ExpConfig
from toolkit.launch.plan import PoolPlan
from toolkit.registry import Registry

TAIL_LINES = 20
STATE_DIR = "launch"  # inside the run folder: arguments and state of every process, the launcher's own files
WORKER_GROUP = "worker-"  # a worker's ranks are the group of this and its index
GRACE_S = 10.0  # between SIGTERM and SIGKILL of a process


@dataclass(frozen=True)
class Node:
    """A node of a deployment: its address for the other nodes, the first of its ports that are ours, the network
    interface with that address (empty: not known), and what the cluster calls it (empty: it calls itself something)."""

    host: str
    port: int
    interface: str = ""
    name: str = ""


@dataclass(frozen=True)
class ProcessSpec:
    """One process to start. Holds no secrets: those travel in the launcher's environment.

    Attributes:
        role, index: name it: ``rank-3``, ``frontend-0``; its log and its state file carry the name.
        env: added to the launcher's own environment.
        node: index into the launcher's nodes.
        group: what runs together as one job step on Slurm, e.g. the ranks of a worker; empty: it is on its own.
        grace_s: between SIGTERM and SIGKILL, to write down what it has.
        critical: its end ends the run.
    """

    role: str
    index: int
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    node: int = 0
    group: str = ""
    grace_s: float = GRACE_S
    critical: bool = True

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"

    @property
    def kind(self) -> str:
        """What kind of process it is: ``rank`` for the ranks of any worker, else its role."""
        return "rank" if self.group.startswith(WORKER_GROUP) else self.role

    @property
    def log(self) -> str:
        """Path of its log inside the run folder."""
        return records.log_name(self.role, self.index)

    def state_file(self, run_dir: Path) -> Path:
        return run_dir / STATE_DIR / f"{self.name}.json"


@dataclass(frozen=True)
class ProcessState:
    """What is known of one process; the content of its state file.

    Attributes:
        state: starting: not reported yet; running; exited; lost: its supervisor ended without a report.
        returncode: of an exited process; negative: the signal that ended it.
        pid, create_time: identify the process on its host; create_time in seconds since the epoch.
        note: why it was lost, as far as its node can say.
    """

    name: str
    state: Literal["starting", "running", "exited", "lost"] = "starting"
    returncode: int | None = None
    host: str = ""
    pid: int = 0
    create_time: float = 0.0
    ended: float = 0.0
    note: str = ""

    @property
    def alive(self) -> bool:
        return self.state in ("starting", "running")


class Job(Protocol):
    """Started processes."""

    specs: tuple[ProcessSpec, ...]

    def poll(self) -> list[ProcessState]:
        """The state of every process, in the order of ``specs``. Cheap: called a few times a second."""
        ...

    def stop(self, grace_s: float) -> None:
        """Ends every process, politely first; returns when all are gone. May be called again."""
        ...


class Launcher(Protocol):
    def nodes(self, pools: Sequence[PoolPlan], num_ports: int, run_dir: Path) -> list[Node]:
        """The nodes of each pool, one after the other, each with ``num_ports`` ports of its own until ``close``.

        Known before ``start``, so that commands can name them. Raises ``RunFailed`` when they cannot be had.
        """
        ...

    def start(self, specs: Sequence[ProcessSpec], run_dir: Path, secrets: Mapping[str, str]) -> Job:
        """Starts all ``specs``. ``secrets`` reach their environment without being written to disk.

        May be called again, for what is started later: the load generator.
        """
        ...

    def silent(self) -> list[str]:
        """Names of the nodes that do not answer; asked when a run fails, because a lost node fails its ranks' peers."""
        ...

    def close(self) -> None:
        """Gives ports and nodes back. May be called again."""
        ...


def with_environment(specs: Sequence[ProcessSpec], cfg: ExpConfig, nodes: Sequence[Node]) -> tuple[ProcessSpec, ...]:
    """``specs`` with what the cluster adds to the environment: the network, ``cluster.env``, ``cluster.role_env``."""
    c = cfg.cluster
    interface = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), c.network_interface)

    def env(spec: ProcessSpec) -> dict[str, str]:
        found = nodes[spec.node].interface
        network = interface if c.network_interface else {"GLOO_SOCKET_IFNAME": found} if found else {}
        return {**network, **spec.env, **c.env, **c.role_env.get(spec.kind, {})}

    return tuple(dataclasses.replace(spec, env=env(spec)) for spec in specs)


def read_state(spec: ProcessSpec, run_dir: Path) -> ProcessState:
    """The state that ``rank.py`` reported; ``starting`` before its first report."""
    try:
        return msgspec.json.decode(spec.state_file(run_dir).read_bytes(), type=ProcessState)
    except FileNotFoundError:
        return ProcessState(spec.name)


def tail(log: Path, lines: int = TAIL_LINES) -> Sequence[str]:
    """The last lines of a log, of which only the end is read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 400 * lines))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def launchers() -> Registry[Callable[[ExpConfig], Launcher]]:
    """Launchers by ``cluster.launcher``."""
    from toolkit.launch.local import LocalLauncher
    from toolkit.launch.slurm import SlurmLauncher

    table: Registry[Callable[[ExpConfig], Launcher]] = Registry("cluster.launcher")
    table.register("local")(LocalLauncher.of)
    table.register("slurm")(SlurmLauncher.of)
    return table
