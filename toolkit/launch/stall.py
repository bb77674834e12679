"""The stall watchdog: when no step is made while requests are in flight, it names the rank that is behind.

Ranks of a worker make every step together, so one that hangs holds all, and none of them fails: each waits in a
collective for the others. Every rank leaves its pulse in the run folder (``engine/pulse.py``). When none of them has
moved for ``stall_s``, the one that has begun the fewest collectives is the one that the others wait for. Before the run
ends, the stacks of all processes go into their logs (``stacks.py``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from toolkit.engine.pulse import FOLDER, Beat, read_beat
from toolkit.launch import stacks
from toolkit.launch.launcher import STATE_DIR, ProcessSpec
from toolkit.launch.stacks import Dumped
from toolkit.launch.watch import RunFailed

LOOK_S = 1.0
SILENT_S = 10.0  # a pulse this much older than the newest one is that of a rank that cannot even write
ORDER = ("idle", "take", "schedule", "agree", "step", "reply")  # of the phases of a turn


class StallWatch:
    """Watches the ranks among ``specs``. Where none leaves a pulse (another engine), it sees nothing."""

    def __init__(self, specs: Sequence[ProcessSpec], run_dir: Path, stall_s: float) -> None:
        self._specs, self._run_dir, self._stall_s = specs, run_dir, stall_s
        workers: dict[str, list[ProcessSpec]] = {}
        for spec in specs:
            if spec.kind == "rank":
                workers.setdefault(spec.role, []).append(spec)
        self._workers = list(workers.values())
        self._seen: list[tuple[object, float]] = [(None, time.monotonic()) for _ in workers]
        self._looked = 0.0

    def marks(self) -> object:
        """Where every rank is; changes as long as any of them gets on, while it warms up too."""
        return tuple((beat.turn, beat.step, beat.collectives) for beat in self._beats())

    def requests(self) -> int:
        """That the ranks hold, as of their last pulse."""
        return sum(beat.requests for beat in self._beats())

    def check(self) -> None:
        """Raises ``RunFailed`` when the ranks of a worker have stalled. Cheap: call it a few times a second."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        for i, ranks in enumerate(self._workers):
            beats = [beat for spec in ranks if (beat := self._read(spec)) is not None]
            moved = tuple((beat.turn, beat.step, beat.collectives, beat.phase) for beat in beats)
            working = any(beat.requests or beat.phase != "idle" for beat in beats)
            if not working or moved != self._seen[i][0]:
                self._seen[i] = moved, now
            elif now - self._seen[i][1] > self._stall_s:
                self._fail(ranks, beats)

    def _beats(self) -> list[Beat]:
        return [beat for ranks in self._workers for spec in ranks if (beat := self._read(spec)) is not None]

    def _read(self, spec: ProcessSpec) -> Beat | None:
        return read_beat(pulse_folder(self._run_dir, spec.role), spec.index)

    def _fail(self, ranks: Sequence[ProcessSpec], beats: Sequence[Beat]) -> None:
        dumped = stacks.ask(self._run_dir, [spec.name for spec in self._specs])
        behind = find_behind(beats)
        log = next((self._run_dir / spec.log for spec in ranks if behind and spec.index == behind.rank), None)
        lines = stacks.last_dump(log) if log else []
        raise RunFailed(describe(beats, behind, dumped, self._stall_s, ranks[0].role), log, lines)


def pulse_folder(run_dir: Path, role: str) -> Path:
    """Where the ranks of a worker leave their pulses; ``rank`` is the role of those of the only one."""
    folder = run_dir / STATE_DIR / FOLDER
    return folder if role == "rank" else folder / role


def find_behind(beats: Sequence[Beat]) -> Beat | None:
    """The rank that the others wait for; None when all are in the same place."""
    if len({_progress(beat) for beat in beats}) > 1:
        return min(beats, key=_progress)
    newest = max(beat.time for beat in beats)
    silent = [beat for beat in beats if newest - beat.time > SILENT_S]
    return silent[0] if silent else None


def _progress(beat: Beat) -> tuple[int, int, int]:
    return beat.collectives, beat.turn, ORDER.index(beat.phase) if beat.phase in ORDER else -1


def describe(
    beats: Sequence[Beat], behind: Beat | None, dumped: dict[str, Dumped], stall_s: float, role: str = "rank"
) -> str:
    """One line: who is behind and where, where the others are, and where to read on."""
    steps = ", ".join(f"{beat.rank}: {beat.step} in {beat.phase}" for beat in beats[:16])
    held = sum(beat.requests for beat in beats)
    head = f"no step for {stall_s:g} s (health.stall_s) with {held} requests on the ranks"
    head += "" if role == "rank" else f" of {role}"
    tail = f"last step of each rank: {steps}{' ...' if len(beats) > 16 else ''}; stacks are in logs/"
    if behind is None:
        return f"{head}: all ranks are in the same place, no one is behind; {tail}"
    name = f"{role}-{behind.rank}"
    newest = max(beat.time for beat in beats)
    how = dumped[name].status if name in dumped else ""
    state = ", its process is stopped (SIGSTOP or a debugger)" if how == "stopped" else ""
    if not state and newest - behind.time > SILENT_S:
        state = ", silent: held in native code, or on a node that hangs"
    return f"{head}: {name} is behind, in {behind.phase} of step {behind.step}{state}; {tail}"
