"""Controller: what operators may ask of a running rank: flush, expert counts, slow down, profile.

Every operation reaches every rank, in the same order. The worker's ``agree`` says how many have reached all of them;
those are carried out between two steps, the same two on every rank, because some are collectives and all must leave
the ranks alike. Knows no sockets. Read next: ``worker.py``.
"""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path
from typing import Any

import torch

from toolkit.engine.eplb.manager import Manager
from toolkit.engine.eplb.recorder import Recorder
from toolkit.engine.messages import Control, ControlReply
from toolkit.engine.scheduler import Scheduler

log = logging.getLogger(__name__)


class Controller:
    """Control operations of one rank.

    Args:
        recorder: None where experts are not counted.
        eplb: None where experts stay where they are.
        profile_dir: profiles go to folders in it; empty: there are none.
    """

    def __init__(
        self, rank: int, scheduler: Scheduler, recorder: Recorder | None, profile_dir: str, device: str,
        eplb: Manager | None = None,
    ) -> None:  # fmt: skip
        self._rank, self._scheduler, self._recorder, self._eplb = rank, scheduler, recorder, eplb
        self._profile_dir, self._device = profile_dir, device
        self._pending: deque[Control] = deque()
        self._sleep_s = 0.0
        self._profile: Profile | None = None

    @property
    def num_pending(self) -> int:
        """Operations that have come and are not carried out."""
        return len(self._pending)

    @property
    def forward_sleep_s(self) -> float:
        """How long to sleep before a forward pass; not at all while an operation waits, which may be to stop that."""
        return 0.0 if self._pending else self._sleep_s

    def take(self, control: Control) -> None:
        self._pending.append(control)

    def apply(self, count: int) -> list[ControlReply]:
        """Carries out the first ``count`` operations. One that cannot be done says why, and changes nothing."""
        return [self._reply(self._pending.popleft()) for _ in range(count)]

    def end_of_pass(self) -> None:
        """After each forward pass: ends a profile that has its steps."""
        if self._profile is not None and self._profile.end_of_pass():
            try:
                log.info("profile: %s", self._stop_profile())
            except (OSError, RuntimeError):
                log.exception("the profile could not be written")  # serving goes on

    def _reply(self, control: Control) -> ControlReply:
        try:
            return ControlReply(control.cid, self._rank, ok=True, detail=self._run(control))
        except ValueError as error:
            return ControlReply(control.cid, self._rank, ok=False, detail=str(error), refused=True)
        except (OSError, RuntimeError) as error:
            log.exception("%s failed", control.op)
            return ControlReply(control.cid, self._rank, ok=False, detail=f"{type(error).__name__}: {error}")

    def _run(self, control: Control) -> str:
        match control.op:
            case "flush_cache":
                self._scheduler.flush_cache()
            case "start_experts":
                self._counting().start()
            case "stop_experts":
                self._counting().stop()
            case "dump_experts":
                return self._counting().dump(control.since)
            case "rebalance_experts":
                self._rebalance(control.placement)
            case "slow_down":
                self._sleep_s = control.sleep_s
            case "start_profile":
                return self._start_profile(control)
            case "stop_profile":
                return self._stop_profile()
            case "shutdown":
                raise AssertionError("shutdown is the worker's")
        return ""

    def _counting(self) -> Recorder:
        if self._recorder is None:
            raise ValueError(
                "experts are not counted: start with engine.expert_distribution_recorder_mode=stat and a MoE model"
            )
        return self._recorder

    def _rebalance(self, placement: str) -> None:
        if self._eplb is None:
            raise ValueError("experts stay where they are: start with engine.enable_eplb=true and a MoE model")
        self._eplb.request(placement)

    def _start_profile(self, control: Control) -> str:
        if self._profile is not None:
            raise ValueError(f"a profile is running ({self._profile.path.parent.name}): stop it first")
        if not self._profile_dir:
            raise ValueError("this rank was given no profile_dir: profiles have nowhere to go")
        path = Path(self._profile_dir) / control.folder / f"rank-{self._rank}.trace.json.gz"
        if path.exists():
            raise ValueError(f"profile {control.folder} exists: choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._profile = Profile(path, control.num_steps, self._device)
        return f"{control.folder}/{path.name}"

    def _stop_profile(self) -> str:
        if self._profile is None:
            raise ValueError("no profile is running: start one, or it has ended by itself after num_steps")
        profile, self._profile = self._profile, None
        profile.write()
        return f"{profile.path.parent.name}/{profile.path.name}"


class Profile:
    """A torch profile of this process, from construction to ``write``.

    Args:
        num_steps: forward passes it covers; 0: any number.
    """

    def __init__(self, path: Path, num_steps: int, device: str) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.path, self._left = path, num_steps
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device != "cpu" else [])
        self._profiler: Any = profile(activities=activities)
        self._profiler.start()

    def end_of_pass(self) -> bool:
        """True after the last forward pass that was asked for."""
        self._left -= 1
        return self._left == 0

    def write(self) -> None:
        """Ends it and writes Chrome's trace format, gzipped, which perfetto.dev and chrome://tracing open."""
        self._profiler.stop()
        part = self.path.with_name(f".{self.path.name}")  # torch compresses by the ending
        self._profiler.export_chrome_trace(str(part))
        part.replace(self.path)


def process_bytes(device: str) -> int:
    """Memory of this process: allocated on its GPU, or resident in the host's."""
    if device != "cpu":
        return int(torch.cuda.memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)
