"""What a test cluster needs beside Slurm: munge, the accounting's database, networks. Started by ``cluster.py``."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence

from tests.slurm import settings
from tests.slurm.settings import Layout

START_S = 60.0
Start = Callable[[str, Sequence[str]], None]  # (name, command): starts a daemon and notes its pid


class ClusterError(Exception):
    """The cluster cannot be brought up here; ``str()`` says why and what to do."""


def start_munge(layout: Layout, start: Start) -> None:
    """A munged of this cluster's own; one that already serves the default socket is used."""
    socket, home = layout.munge, layout.folder / "munge"
    asked = ("munge", "-n", "-S", str(socket))
    if not silent(*asked):
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
    start("munged", ["runuser", "-u", "munge", "--", *command])
    wait(lambda: not silent(*asked), "munged answers")


def start_accounting(layout: Layout, start: Start, env: dict[str, str]) -> None:
    data = layout.folder / "mysql"
    data.mkdir()
    shutil.chown(data, "mysql", "mysql")
    login = "--auth-root-authentication-method=normal"
    must("mariadb-install-db", "--user=mysql", f"--datadir={data}", "--skip-test-db", login)
    socket = data / "socket"
    where = [f"--datadir={data}", f"--socket={socket}", f"--pid-file={data}/pid"]
    network = ["--bind-address=127.0.0.1", f"--port={layout.mariadb_port}"]
    start("mariadbd", ["mariadbd", "--no-defaults", "--user=mysql", *where, *network])
    sql = "CREATE USER slurm@localhost IDENTIFIED BY 'slurm'; CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm'; "
    sql += "GRANT ALL ON slurm_acct_db.* TO slurm@localhost; GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';"
    wait(lambda: not silent("mariadb", f"--socket={socket}", "-uroot", "-e", sql), "MariaDB answers")
    start("slurmdbd", ["slurmdbd", "-D"])
    user = settings.user()
    for words in (
        ["cluster", settings.CLUSTER],
        ["account", "research", "Description=tests", "Organization=tests"],
        ["user", user, "Account=research"],
    ):
        command = ["sacctmgr", "-i", "add", *words]
        wait(lambda argv=command: not silent(*argv, env=env), " ".join(command))  # type: ignore[misc]


def make_networks(layout: Layout) -> None:
    bridge = layout.bridge
    must("ip", "link", "add", bridge, "type", "bridge")
    must("ip", "address", "add", f"{layout.host_address}/24", "dev", bridge)
    must("ip", "link", "set", bridge, "up")
    for index in range(1, layout.nodes + 1):
        name, veth = layout.netns(index), f"{bridge}-{index}"
        must("ip", "netns", "add", name)
        must("ip", "link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", name)
        must("ip", "link", "set", veth, "master", bridge, "up")
        must("ip", "-n", name, "address", "add", f"{layout.address(index)}/24", "dev", "eth0")
        must("ip", "-n", name, "link", "set", "eth0", "up")
        must("ip", "-n", name, "link", "set", "lo", "up")
        must("ip", "-n", name, "route", "add", "default", "via", layout.host_address)


def remove_networks(layout: Layout) -> None:
    for index in range(1, layout.nodes + 1):
        silent("ip", "netns", "delete", layout.netns(index))
    silent("ip", "link", "delete", layout.bridge)


def wait(condition: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
    """Returns when ``condition`` holds; ``ClusterError`` when it does not within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.1)


def silent(*argv: str, env: dict[str, str] | None = None) -> int:
    full = {**os.environ, **(env or {})}
    return subprocess.run(argv, capture_output=True, check=False, env=full, stdin=subprocess.DEVNULL).returncode


def must(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ClusterError(f"{' '.join(argv)} failed: {done.stderr.strip()}")
