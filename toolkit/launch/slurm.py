"""SlurmLauncher: inside an allocation, every group of processes as a job step of its own.

Runs on the first node, in the batch script (or an ``salloc`` shell). Each step is one ``srun`` whose standard input is
a pipe from here: closing it, or dying, ends the step's processes in order, wherever they are, even where slurmd is
gone. States come back through the step's standard output, never through a file system that may lag. Nothing here is
done by a job's name. ``srun.py`` has the command lines; submission is ``submit.py``'s. Read next: ``running_step.py``,
``rank.py``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from toolkit.config.cluster import ClusterConfig
from toolkit.config.experiment import ExpConfig
from toolkit.launch import node, queue, srun
from toolkit.launch.launcher import STATE_DIR, Node, ProcessSpec, ProcessState
from toolkit.launch.plan import PoolPlan
from toolkit.launch.preflight import BadNode, bad_nodes
from toolkit.launch.rank import SAYS, Step
from toolkit.launch.running_step import RunningStep, end_steps
from toolkit.launch.watch import RunFailed

log = logging.getLogger(__name__)

STEPS = "steps"  # inside STATE_DIR: what each step is told, and what srun says about it
NODES_ANSWER_S = 120.0


@dataclass(frozen=True)
class Allocation:
    """The nodes this process may use, by component; one component unless the job is heterogeneous."""

    job_id: str
    components: tuple[tuple[str, ...], ...]

    @classmethod
    def of_environment(cls) -> Allocation | None:
        """The allocation that this process is in, or None."""
        job_id = os.environ.get("SLURM_JOB_ID")
        if not job_id:
            return None
        size = int(os.environ.get("SLURM_HET_SIZE", "0"))
        lists = [os.environ[f"SLURM_JOB_NODELIST_HET_GROUP_{i}"] for i in range(size)]
        return cls(
            job_id, tuple(tuple(queue.hostnames(nodes)) for nodes in lists or [os.environ["SLURM_JOB_NODELIST"]])
        )

    def take(self, pools: Sequence[PoolPlan]) -> list[tuple[str, int | None]]:
        """(name, component) of each node of ``pools`` in their order. Raises ``RunFailed`` when there are too few."""
        if len(self.components) == 1:
            names, need = self.components[0], sum(pool.num_nodes for pool in pools)
            self._enough(f"{need} nodes", need, names)
            return [(name, None) for name in names[:need]]
        if len(self.components) != len(pools):
            raise RunFailed(
                f"job {self.job_id} has {len(self.components)} components, the plan has {len(pools)} pools "
                f"({', '.join(pool.name for pool in pools)}): submit with the same cluster.pools"
            )
        taken: list[tuple[str, int | None]] = []
        for index, (pool, names) in enumerate(zip(pools, self.components)):
            self._enough(f"{pool.num_nodes} nodes for pool {pool.name}", pool.num_nodes, names)
            taken += [(name, index) for name in names[: pool.num_nodes]]
        return taken

    def _enough(self, what: str, need: int, names: Sequence[str]) -> None:
        if len(names) < need:
            raise RunFailed(f"the plan needs {what}, job {self.job_id} has {len(names)} ({','.join(names)})")


class SlurmJob:
    """The processes of one ``start``."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        steps: Mapping[str, tuple[RunningStep, list[ProcessSpec]]],
        names: Sequence[str],
        lost: set[str],
    ) -> None:
        """``names``: of the nodes, as Slurm has them; ``lost``: those that do not answer, as far as that is known."""
        self.specs = tuple(specs)
        self._steps, self._names, self._lost = steps, names, lost
        self._states = {spec.name: ProcessState(spec.name) for spec in specs}

    def poll(self) -> list[ProcessState]:
        for step, members in self._steps.values():
            over = step.over  # asked before its last words are read
            for line in step.lines(SAYS):
                state = msgspec.json.decode(line, type=ProcessState)
                if state.name:
                    self._states[state.name] = state
                else:  # a node that does not even know what it should run
                    self._lose([spec for spec in members if self._names[spec.node] == state.host], state.note)
            if over:
                self._lose(members)
        return [self._states[spec.name] for spec in self.specs]

    def stop(self, grace_s: float) -> None:
        for step, _ in self._steps.values():
            step.call_off()
        deadline = time.monotonic() + grace_s + 5.0
        while time.monotonic() < deadline and self._within_reach():
            time.sleep(0.05)
        end_steps([step for step, _ in self._steps.values()], bool(self._lost))
        self.poll()

    def _within_reach(self) -> bool:
        """Whether a step goes on that has more than what lost nodes hold."""
        alive = {state.name for state in self.poll() if state.alive}
        return any(
            not step.over
            and (not self._lost or any(s.name in alive and self._names[s.node] not in self._lost for s in its))
            for step, its in self._steps.values()
        )

    def _lose(self, members: Sequence[ProcessSpec], note: str = "") -> None:
        """What has not reported its end when its step is over will not do so any more."""
        for spec in members:
            state = self._states[spec.name]
            if state.alive:
                self._states[spec.name] = replace(state, state="lost", ended=time.time(), note=note)


class SlurmLauncher:
    def __init__(self, cluster: ClusterConfig, allocation: Allocation) -> None:
        self._cluster = cluster
        self._allocation = allocation
        self._taken: list[tuple[str, int | None]] = []
        self._keepers: list[RunningStep] = []
        self._lost: set[str] = set()

    @classmethod
    def of(cls, cfg: ExpConfig) -> SlurmLauncher:
        allocation = Allocation.of_environment()
        assert allocation, "the Slurm launcher starts job steps: it runs inside an allocation, see submit.py"
        return cls(cfg.cluster, allocation)

    def nodes(self, pools: Sequence[PoolPlan], num_ports: int, run_dir: Path) -> list[Node]:
        self.close()
        (run_dir / STATE_DIR / STEPS).mkdir(parents=True, exist_ok=True)
        self._taken = self._allocation.take(pools)
        names = [name for name, _ in self._taken]
        ask = node.Ask(names, queue.addresses(names), num_ports, self._cluster.port, self._cluster.network_interface)
        answers = self._ask(ask, run_dir)
        return [Node(a.host, a.port, a.interface, name) for name in names if (a := answers[name])]

    def start(self, specs: Sequence[ProcessSpec], run_dir: Path, secrets: Mapping[str, str]) -> SlurmJob:
        assert self._taken, "nodes() comes first"
        (run_dir / STATE_DIR / STEPS).mkdir(parents=True, exist_ok=True)
        steps: dict[str, tuple[RunningStep, list[ProcessSpec]]] = {}
        job = SlurmJob(specs, steps, [name for name, _ in self._taken], self._lost)
        for name, members in self._split(specs):
            steps[name] = (self._start_step(name, members, run_dir, secrets), members)
        return job

    def silent(self) -> list[str]:
        with contextlib.suppress(queue.SlurmError):
            self._lost |= set(queue.silent([name for name, _ in self._taken]) if len(self._taken) > 1 else [])
        return sorted(self._lost)

    def close(self) -> None:
        for keeper in self._keepers:
            keeper.call_off()
        deadline = time.monotonic() + (0.0 if self._lost else 5.0)
        for keeper in self._keepers:
            keeper.wait(deadline)
        end_steps(self._keepers, bool(self._lost))
        self._keepers = []

    def _split(self, specs: Sequence[ProcessSpec]) -> Iterator[tuple[str, list[ProcessSpec]]]:
        """Steps; a step lies within one component of the job."""
        for name, members in srun.groups(specs):
            for component in sorted({self._taken[s.node][1] or 0 for s in members}):
                part = [s for s in members if (self._taken[s.node][1] or 0) == component]
                yield (name if len(part) == len(members) else f"{name}-{component}"), part

    def _start_step(
        self, name: str, members: Sequence[ProcessSpec], run_dir: Path, secrets: Mapping[str, str]
    ) -> RunningStep:
        by_node: dict[str, tuple[ProcessSpec, ...]] = {}
        for spec in members:
            host = self._taken[spec.node][0]
            by_node[host] = (*by_node.get(host, ()), spec)
        file = _file(run_dir, name)
        file.write_bytes(msgspec.json.encode(Step(run_dir, by_node), enc_hook=str))
        where = srun.Placement(tuple(by_node), max(map(len, by_node.values())), self._taken[members[0].node][1])
        options, command = srun.process_command(self._cluster, members[0].kind, run_dir, file)
        argv = srun.step(name, where, self._cluster, [*options, *command])
        return RunningStep(name, argv, file.with_suffix(".log"), secrets)

    def _ask(self, ask: node.Ask, run_dir: Path) -> dict[str, node.Answer]:
        """What every node says, by name. Its process stays there until ``close``."""
        command = [*srun.python(), "-m", "toolkit.launch.node", msgspec.json.encode(ask).decode()]
        for component in dict.fromkeys(component for _, component in self._taken):
            names = tuple(name for name, its in self._taken if its == component)
            argv = srun.step("nodes", srun.Placement(names, 1, component), self._cluster, command)
            self._keepers.append(RunningStep("nodes", argv, _file(run_dir, "nodes").with_suffix(".log"), {}))
        answers: dict[str, node.Answer] = {}
        deadline = time.monotonic() + NODES_ANSWER_S
        while len(answers) < len(ask.names):
            over = [keeper for keeper in self._keepers if keeper.over]
            for keeper in self._keepers:
                for line in keeper.lines(node.SAYS):
                    answer = msgspec.json.decode(line, type=node.Answer)
                    if answer.error:
                        raise _bad(ask, [answer.name], answer.error, run_dir)
                    answers[answer.name] = answer
            silent = [name for name in ask.names if name not in answers]
            if silent and over:
                raise _bad(ask, silent, f"job step ended without a word: {over[0].messages()[-500:]}", run_dir)
            if silent and time.monotonic() > deadline:
                raise _bad(ask, silent, f"no answer within {NODES_ANSWER_S:g} s", run_dir)
            time.sleep(0.02)
        return answers


def _bad(ask: node.Ask, names: Sequence[str], reason: str, run_dir: Path) -> RunFailed:
    """A fault of some nodes is theirs; one of all is of what they were asked."""
    if len(names) == len(ask.names) > 1:
        return RunFailed(f"nodes {', '.join(names)}: {reason}")
    return bad_nodes(run_dir, [BadNode(ask.names.index(name), name, [reason]) for name in names])


def _file(run_dir: Path, step: str) -> Path:
    """What a step is told; beside it, as .log, what srun says about it."""
    return run_dir / STATE_DIR / STEPS / f"{step}.json"
