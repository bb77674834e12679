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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from tests.slurm import settings
from tests.slurm.settings import Layout

DAEMONS = "daemons.json"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sinfo", "srun", "unshare")
START_S = 60.0
STOP_S = 20.0


class ClusterError(Exception):
    """The cluster cannot be brought up here; ``str()`` says why and what to do."""


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
            self._start_munge()
            if self.layout.mode == "netns":
                self._make_networks()
            if self.layout.accounting:
                self._start_accounting()
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
            self._remove_networks()
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

    def start_node(self, index: int) -> None:
        """Starts the slurmd of a node (again)."""
        name = f"node{index}"
        inside = f"hostname {name} && exec {' '.join(self.inside('slurmd', '-D', '-N', name))}"
        argv = ["unshare", "--uts", "sh", "-c", inside]
        if self.layout.mode == "netns":  # `ip netns exec` would remount /sys, and slurmd would miss its cgroups
            argv = ["nsenter", f"--net=/run/netns/{self.layout.netns(index)}", *argv]
        self.start(name, argv)
        *others, daemon = self.daemons()
        wait(lambda: _uts(daemon.pid) not in ("", _uts(os.getpid())), f"{name} has a namespace of its own")
        self._save([*others, replace(daemon, uts=_uts(daemon.pid))])

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

    def _start_munge(self) -> None:
        """A munged of this cluster's own; one that already serves the default socket is used."""
        socket, home = self.layout.munge, self.folder / "munge"
        asked = ("munge", "-n", "-S", str(socket))
        if not _silent(*asked):
            return
        for folder in {home, socket.parent}:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.chown(folder, "munge", "munge")
            folder.chmod(0o755)
        key = home / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        shutil.chown(key, "munge", "munge")
        files = [f"--{name}-file={home / name}" for name in ("key", "log", "pid", "seed")]
        command = ["munged", "--foreground", "--force", f"--socket={socket}", *files]
        self.start("munged", ["runuser", "-u", "munge", "--", *command])
        wait(lambda: not _silent(*asked), "munged answers")

    def _start_accounting(self) -> None:
        data = self.folder / "mysql"
        data.mkdir()
        shutil.chown(data, "mysql", "mysql")
        login = "--auth-root-authentication-method=normal"
        _must("mariadb-install-db", "--user=mysql", f"--datadir={data}", "--skip-test-db", login)
        socket = data / "socket"
        where = [f"--datadir={data}", f"--socket={socket}", f"--pid-file={data}/pid"]
        network = ["--bind-address=127.0.0.1", f"--port={self.layout.mariadb_port}"]
        self.start("mariadbd", ["mariadbd", "--no-defaults", "--user=mysql", *where, *network])
        sql = "CREATE USER slurm@localhost IDENTIFIED BY 'slurm'; CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm'; "
        sql += "GRANT ALL ON slurm_acct_db.* TO slurm@localhost; GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';"
        wait(lambda: not _silent("mariadb", f"--socket={socket}", "-uroot", "-e", sql), "MariaDB answers")
        self.start("slurmdbd", ["slurmdbd", "-D"])
        user = settings.user()
        for words in (
            ["cluster", settings.CLUSTER],
            ["account", "research", "Description=tests", "Organization=tests"],
            ["user", user, "Account=research"],
        ):
            command = ["sacctmgr", "-i", "add", *words]
            wait(lambda argv=command: not _silent(*argv, env=self.env), " ".join(command))  # type: ignore[misc]

    def _make_networks(self) -> None:
        bridge = self.layout.bridge
        _must("ip", "link", "add", bridge, "type", "bridge")
        _must("ip", "address", "add", f"{self.layout.host_address}/24", "dev", bridge)
        _must("ip", "link", "set", bridge, "up")
        for index in range(1, self.layout.nodes + 1):
            name, veth = self.layout.netns(index), f"{bridge}-{index}"
            _must("ip", "netns", "add", name)
            _must("ip", "link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", name)
            _must("ip", "link", "set", veth, "master", bridge, "up")
            _must("ip", "-n", name, "address", "add", f"{self.layout.address(index)}/24", "dev", "eth0")
            _must("ip", "-n", name, "link", "set", "eth0", "up")
            _must("ip", "-n", name, "link", "set", "lo", "up")
            _must("ip", "-n", name, "route", "add", "default", "via", self.layout.host_address)

    def _remove_networks(self) -> None:
        for index in range(1, self.layout.nodes + 1):
            _silent("ip", "netns", "delete", self.layout.netns(index))
        _silent("ip", "link", "delete", self.layout.bridge)

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
    if _silent("unshare", "--uts", "--net" if layout.mode == "netns" else "--uts", "true"):
        raise ClusterError("this machine allows no namespaces (unshare --uts fails): a container needs --privileged")


def wait(condition: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
    """Returns when ``condition`` holds; ``ClusterError`` when it does not within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.1)


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


def _silent(*argv: str, env: dict[str, str] | None = None) -> int:
    full = {**os.environ, **(env or {})}
    return subprocess.run(argv, capture_output=True, check=False, env=full, stdin=subprocess.DEVNULL).returncode


def _must(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ClusterError(f"{' '.join(argv)} failed: {done.stderr.strip()}")


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
