"""A real Slurm cluster of N nodes on this one machine, for tests: ``python -m tests.slurm.cluster up --nodes 4``.

Every node is a slurmd of its own with its own host name (uts namespace) and, in mode netns, its own network. GPUs are
device files that do nothing. Needs root and Debian's packages (``make slurm-up`` installs them). Everything lies in one
folder; what was started is in its ``daemons.json`` and is ended by pid. ``settings.py`` has the texts of the
configuration. It does not know the toolkit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from tests.slurm import services, settings
from tests.slurm.services import ClusterError, silent, wait
from tests.slurm.settings import Layout

DAEMONS = "daemons.json"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sinfo", "srun", "unshare")
STOP_S = 20.0


@dataclass(frozen=True)
class Daemon:
    """A process that ``up`` started.

    Attributes:
        name: munged, slurmctld, node1, ...
        uts: a node's namespace: everything that a node ever started is in it, whatever became of its slurmd.
    """

    name: str
    pid: int
    create_time: float
    argv: list[str]
    uts: str = ""


class Cluster:
    """The cluster in ``layout.folder``; that folder alone says what runs."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.folder = layout.folder

    @property
    def env(self) -> dict[str, str]:
        """What a shell needs to talk to this cluster."""
        return {"SLURM_CONF": str(self.layout.conf)}

    def up(self) -> None:
        """Starts everything and returns when all nodes are idle.

        Raises:
            ClusterError: not possible here, or something did not come up; all is taken down again.
        """
        check_machine(self.layout)
        if self.folder.exists():
            self.down()
        settings.write(self.layout)
        self._save([])
        try:
            services.start_munge(self.layout, self.start)
            if self.layout.mode == "netns":
                services.make_networks(self.layout)
            if self.layout.accounting:
                services.start_accounting(self.layout, self.start, self.env)
            self.start("slurmctld", self.inside("slurmctld", "-D", "-i"))
            for index in range(1, self.layout.nodes + 1):
                self.start_node(index)
            self._wait_idle()
        except BaseException:
            self.down(keep_folder=True)
            raise

    def down(self, keep_folder: bool = False) -> None:
        """Ends every daemon and every job step by pid, takes the networks away, removes the folder."""
        daemons = self.daemons()
        steps = _in_namespaces({d.uts for d in daemons if d.uts})
        nodes_first = sorted(daemons, key=lambda d: ("node" not in d.name, d.name == "munged", d.name == "mariadbd"))
        _end([p for d in nodes_first if (p := find(d))] + steps)
        if self.layout.mode == "netns":
            services.remove_networks(self.layout)
        if not keep_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def daemons(self) -> list[Daemon]:
        try:
            return [Daemon(**entry) for entry in json.loads((self.folder / DAEMONS).read_text())]
        except FileNotFoundError:
            return []

    def daemon(self, name: str) -> psutil.Process:
        """The running process called ``name``."""
        found = [p for d in self.daemons() if d.name == name and (p := find(d))]
        if not found:
            raise ClusterError(f"{name} does not run")
        return found[-1]

    def start_node(self, index: int, hidden: Path | None = None) -> None:
        """Starts the slurmd of a node (again); a folder ``hidden`` is not there for what runs on it."""
        name = f"node{index}"
        inside = f"hostname {name} && exec {' '.join(self.inside('slurmd', '-D', '-N', name))}"
        argv = ["unshare", "--uts", "sh", "-c", inside]
        if hidden:
            argv = ["unshare", "--uts", "--mount", "sh", "-c", f"mount -t tmpfs none {hidden} && {inside}"]
        if self.layout.mode == "netns":  # `ip netns exec` would remount /sys, and slurmd would miss its cgroups
            argv = ["nsenter", f"--net=/run/netns/{self.layout.netns(index)}", *argv]
        self.start(name, argv)
        *others, daemon = self.daemons()
        wait(lambda: _uts(daemon.pid) not in ("", _uts(os.getpid())), f"{name} has a namespace of its own")
        self._save([*others, replace(daemon, uts=_uts(daemon.pid))])

    def crash_node(self, index: int) -> None:
        """Kills everything on a node at once, its slurmd included."""
        for process in _in_namespaces({d.uts for d in self.daemons() if d.name == f"node{index}"}):
            process.kill()

    def start(self, name: str, argv: Sequence[str]) -> None:
        """Starts a daemon in the foreground of a session of its own and notes its pid."""
        env = {**os.environ, **self.env}
        with (self.folder / "logs" / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
            )
        created = psutil.Process(process.pid).create_time()
        self._save([*self.daemons(), Daemon(name, process.pid, created, list(argv))])

    def run(self, *argv: str, check: bool = True, timeout_s: float = 60) -> str:
        """Output of a Slurm command on this cluster."""
        env = {**os.environ, **self.env}
        command = self.inside(*argv)
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(argv)} failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def inside(self, *argv: str) -> list[str]:
        """``argv`` where the cluster's programs are."""
        return ["chroot", self.layout.root, *argv] if self.layout.root else list(argv)

    def idle_nodes(self) -> list[str]:
        states = dict(line.split() for line in self.run("sinfo", "-hN", "-o", "%N %t").splitlines())
        return [node for node, state in states.items() if state == "idle"]

    def _wait_idle(self) -> None:
        def idle() -> bool:
            try:
                return len(self.idle_nodes()) == self.layout.nodes
            except (ClusterError, subprocess.TimeoutExpired):
                return False

        wait(idle, f"all nodes idle; logs in {self.folder / 'logs'}")

    def _save(self, daemons: Sequence[Daemon]) -> None:
        part = self.folder / f".{DAEMONS}"
        part.write_text(json.dumps([asdict(d) for d in daemons], indent=2))
        part.replace(self.folder / DAEMONS)


def check_machine(layout: Layout) -> None:
    """Raises ``ClusterError`` where a cluster cannot be brought up."""
    if os.geteuid() != 0:
        raise ClusterError("a test cluster needs root: slurmd starts tasks as other users and host names are set")
    programs = [*PROGRAMS, *(("ip", "nsenter") if layout.mode == "netns" else ())]
    programs += ["mariadbd", "slurmdbd"] if layout.accounting else []
    if missing := [name for name in programs if shutil.which(name) is None]:
        raise ClusterError(f"not installed: {', '.join(missing)}; on Debian: make slurm-install")
    if silent("unshare", "--uts", "--net" if layout.mode == "netns" else "--uts", "true"):
        raise ClusterError("this machine allows no namespaces (unshare --uts fails): a container needs --privileged")


def find(daemon: Daemon) -> psutil.Process | None:
    """The daemon's process if it lives; never another one with its pid."""
    try:
        process = psutil.Process(daemon.pid)
        alive = abs(process.create_time() - daemon.create_time) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
        return process if alive else None
    except psutil.NoSuchProcess:
        return None


def _uts(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/uts").readlink())
    except OSError:
        return ""


def _in_namespaces(namespaces: set[str]) -> list[psutil.Process]:
    """All processes of nodes: slurmstepds outlive their slurmd."""
    found = []
    for pid in psutil.pids():
        if _uts(pid) in namespaces:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
    return found


def _end(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(processes, STOP_S)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, STOP_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=["up", "down", "status"])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--gpus", type=int, default=8, help="fake GPUs of a node")
    parser.add_argument("--mode", choices=["uts", "netns"], default="uts", help="netns: a network for each node")
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd and MariaDB")
    parser.add_argument("--folder", type=Path, default=settings.FOLDER)
    args = parser.parse_args()
    saved = Layout.saved(args.folder)
    layout = Layout(args.folder, args.nodes, args.gpus, args.mode, args.accounting)
    cluster = Cluster(layout if args.action == "up" or saved is None else saved)
    try:
        if args.action == "up":
            begin = time.monotonic()
            cluster.up()
            print(f"{layout.nodes} nodes in {time.monotonic() - begin:.1f} s; to use them:", file=sys.stderr)
            print(f"export SLURM_CONF={layout.conf}")
        elif args.action == "down":
            cluster.down()
        else:
            print(cluster.run("sinfo"))
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
