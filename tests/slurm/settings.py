"""Where a test cluster lies and what its configuration files say. Read next: ``cluster.py``."""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FOLDER = Path(os.environ.get("WIDEEP_SLURM_DIR") or "/tmp/wideep-slurm")
CLUSTER = "wideep"
LAYOUT = "layout.json"

SLURM_CONF = """\
ClusterName={cluster}
SlurmctldHost={controller}({controller_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge},cred_expire=5
CredType=cred/munge
MpiDefault=none
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/logs/slurmctld.log
SlurmdLogFile={folder}/logs/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,defer_batch
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=15
SlurmctldTimeout=15
InactiveLimit=0
KillWait=10
OverTimeLimit=0
MinJobAge=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
{accounting}
{nodes}
{topology}
PartitionName=batch Nodes=ALL Default=YES MaxTime=08:00:00 State=UP PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes=ALL MaxTime=00:30:00 State=UP PriorityTier=10 PreemptMode=OFF
"""

ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStorageEnforce=associations,limits
JobAcctGatherType=jobacct_gather/none"""

SLURMDBD_CONF = """\
AuthType=auth/munge
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
LogFile={folder}/logs/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={mariadb}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""


@dataclass(frozen=True)
class Layout:
    """A cluster on paper.

    Attributes:
        port: the controller's; every other port follows from it.
        root: a Debian of its own that Slurm's programs are taken from (``debian13.py``); empty: this machine's.
        block: nodes of an NVLink domain, for topology/block (Slurm 23.11 and later); 0: none are told.
    """

    folder: Path
    nodes: int = 4
    gpus: int = 8
    mode: Literal["uts", "netns"] = "uts"
    accounting: bool = False
    port: int = 16817
    root: str = ""
    block: int = 0

    @classmethod
    def saved(cls, folder: Path) -> Layout | None:
        """The layout of the cluster that lies in ``folder``."""
        try:
            return cls(folder, **json.loads((folder / LAYOUT).read_text()))
        except FileNotFoundError:
            return None

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def munge(self) -> Path:
        """munge's socket. The accounting's programs know only the default one."""
        return Path("/run/munge/munge.socket.2") if self.accounting else self.folder / "munge" / "socket"

    @property
    def dbd_port(self) -> int:
        return self.port + 2

    @property
    def mariadb_port(self) -> int:
        return self.port + 3

    @property
    def bridge(self) -> str:
        return "slurmbr0"

    @property
    def host_address(self) -> str:
        """Of the controller and of whoever submits."""
        return "10.213.0.1" if self.mode == "netns" else "127.0.0.1"

    def address(self, index: int) -> str:
        return f"10.213.0.{10 + index}" if self.mode == "netns" else f"127.0.1.{index}"

    def netns(self, index: int) -> str:
        return f"slurm-node{index}"


def write(layout: Layout) -> None:
    """Makes the cluster's folder with its configuration and its fake GPUs."""
    folder = layout.folder
    for name in ("state", "logs", "gpus", *(f"spool-node{i}" for i in range(1, layout.nodes + 1))):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    keys = {key: value for key, value in dataclasses.asdict(layout).items() if key != "folder"}
    (folder / LAYOUT).write_text(json.dumps(keys))
    gpus = _gpus(layout)
    nodes = "\n".join(
        f"NodeName=node{i} NodeAddr={layout.address(i)} Port={layout.port + 100 + i} CPUs=64 RealMemory=16000"
        f"{f' Gres=gpu:{layout.gpus}' if gpus else ''} State=UNKNOWN"
        for i in range(1, layout.nodes + 1)
    )
    accounting = ACCOUNTING.format(port=layout.dbd_port) if layout.accounting else ""
    layout.conf.write_text(
        SLURM_CONF.format(
            cluster=CLUSTER, controller=os.uname().nodename, controller_address=layout.host_address, port=layout.port,
            folder=folder, nodes=nodes, accounting=accounting, munge=layout.munge,
            topology="TopologyPlugin=topology/block" if layout.block else "",
        )
    )  # fmt: skip
    (folder / "gres.conf").write_text(gpus)
    if layout.root:
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    if layout.block:
        (folder / "topology.conf").write_text(_blocks(layout))
    dbd = folder / "slurmdbd.conf"
    dbd.write_text(SLURMDBD_CONF.format(port=layout.dbd_port, folder=folder, mariadb=layout.mariadb_port))
    dbd.chmod(0o600)


def _gpus(layout: Layout) -> str:
    """gres.conf, after making its device files: plain files would be counted but not be made visible to tasks."""
    if not layout.gpus:
        return ""
    for index in range(layout.gpus):
        os.mknod(layout.folder / "gpus" / f"gpu{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    files = f"{layout.folder}/gpus/gpu" + (f"[0-{layout.gpus - 1}]" if layout.gpus > 1 else "0")
    return f"NodeName=node[1-{layout.nodes}] Name=gpu Count={layout.gpus} File={files}\n"


def _blocks(layout: Layout) -> str:
    """topology.conf: ``block`` nodes each."""
    firsts = range(1, layout.nodes + 1, layout.block)
    lines = [f"BlockName=block{i + 1} Nodes=node[{n}-{n + layout.block - 1}]" for i, n in enumerate(firsts)]
    return "\n".join([*lines, f"BlockSizes={layout.block}", ""])


def user() -> str:
    return getpass.getuser()
