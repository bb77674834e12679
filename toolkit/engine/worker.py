"""Worker: one process, one rank. Receive, agree on the step, schedule, run, reply.

    python -m toolkit.engine.worker --args FILE --rank R

The loop, on every rank alike: take messages; the scheduler proposes a batch; all ranks ``agree``; if anybody has
tokens, everybody runs a forward (possibly with none of its own), because every rank joins every collective.
Ranks sleep only when all agree that there is nothing to do and that all have seen the same number of messages:
each message of the frontend reaches every rank (as itself or as ``Wake``), so whoever still lacks one will be woken.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import signal
import sys
import time
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from toolkit.engine import device
from toolkit.engine.agree import Agreement, AttentionDpBalance, Proposal, agree
from toolkit.engine.arch import context_length, read_arch
from toolkit.engine.arch_check import check
from toolkit.engine.args import WorkerArgs, read_worker_args, run_token
from toolkit.engine.control import Controller, process_bytes
from toolkit.engine.core import Batch, StepContext
from toolkit.engine.dims import ParallelDims
from toolkit.engine.disagg.part import make_part, make_transfer
from toolkit.engine.eplb.setup import make_manager, make_recorder, num_nodes
from toolkit.engine.link import Link
from toolkit.engine.memory import memory_by_kind
from toolkit.engine.messages import (
    Abort,
    Control,
    ControlReply,
    Failed,
    Generate,
    Handover,
    Output,
    Outputs,
    Progress,
    Ready,
    ToRank,
)
from toolkit.engine.overlap import split
from toolkit.engine.parallel import Groups
from toolkit.engine.peers import Peers
from toolkit.engine.pipeline import Pipeline, Step
from toolkit.engine.prepare import prepare
from toolkit.engine.pulse import Pulse
from toolkit.engine.runner import ModelRunner
from toolkit.engine.stats import stats_of
from toolkit.engine.steplog import StepLog
from toolkit.records.steps import steps_path

log = logging.getLogger("toolkit.engine.worker")

STATS_S = 0.25
PROGRESS_S = 0.2


class Worker:
    """One rank, from its arguments to its end."""

    def __init__(self, args: WorkerArgs, rank: int, link: Link) -> None:
        self.args, self.rank, self.link = args, rank, link
        self.dims = ParallelDims.of(args.parallel)
        self.dp_rank = self.dims.dp_rank(rank)
        self.leads = self.dims.leader(self.dp_rank) == rank
        self._progress_sent = 0.0
        self._launched, self._steps, self._step_s, self._stats_sent = 0, 0, 0.0, 0.0
        self._shutdown: Control | None = None
        self._balance = AttentionDpBalance(args.engine.attention_dp_config)
        self._load()

    # --- start ------------------------------------------------------------------------------------

    def _load(self) -> None:
        args, engine = self.args, self.args.engine
        arch = read_arch(args.model)
        errors = check(arch, self.dims, engine)
        if errors:
            raise ValueError("; ".join(errors))
        self.device = device.use(args.device, args.local_ranks[self.rank])
        if self.rank == 0 and args.experts_path:
            Path(args.experts_path).parent.mkdir(parents=True, exist_ok=True)
        self._progress("connect", 0, self.dims.tp_size)
        self.groups = Groups.connect(self.dims, self.rank, args.rank_hosts[0], args.dist_port, self.device)
        self.peers = Peers(self.groups.tp_cpu)
        self.pulse = Pulse(Path(args.pulse_dir), self.rank, self.groups.collectives) if args.pulse_dir else None
        memory = memory_by_kind(arch, self.dims, engine, args.model.dtype, args.device)
        total = sum(memory.values()) - memory["kv_cache"] - memory["eplb_spare"]
        self.runner = ModelRunner(
            args.model, arch, engine, self.groups, self.device, lambda done: self._progress("load", done, total),
            num_nodes(args.rank_hosts, self.dims), make_transfer(args, self.rank),
        )  # fmt: skip
        self.recorder = make_recorder(arch, self.runner.moe, args.experts_path, self.device)
        self.runner.moe.recorder = self.recorder  # before graphs are captured, which then count as well
        if self.recorder is not None:
            self.recorder.recording = False
        folder = Path(args.experts_path).parent if args.experts_path else None
        self.eplb = make_manager(arch, self.runner.moe, self.recorder, folder)  # its buffers come before the KV cache
        used = prepare(self.runner, self._progress)
        if self.recorder is not None:
            self.recorder.start()
        self.max_len = context_length(arch, self.runner.engine)
        self.scheduler = self.runner.new_scheduler()
        self.part = make_part(args, self.rank, self.groups, self.runner, self.scheduler)
        self.step_log: StepLog | None = None
        if self.leads and args.steps_dir:
            self.step_log = StepLog(steps_path(Path(args.steps_dir), self.rank), self.dp_rank, engine.page_size)
        self.control = Controller(self.rank, self.scheduler, self.recorder, args.profile_dir, self.device, self.eplb)
        ahead = self.device != "cpu" and not engine.disable_overlap_schedule
        self.pipeline = Pipeline(self.runner, self.scheduler, ahead, self._over)
        info = {
            "max_model_len": self.max_len,
            "max_total_tokens": self.runner.cache.num_blocks * engine.page_size,
            "mapping": self.dims.mapping,
            "memory_bytes": memory | used | {"process": process_bytes(self.device)},
        }
        self.link.send(Ready(self.rank, info, self.part.kv if self.part is not None else b""))
        self._send_stats()  # figures exist from the first moment
        log.info("rank %d ready: %s", self.rank, info)

    def _progress(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0 or done >= total or now - self._progress_sent > PROGRESS_S:
            self.link.send(Progress(self.rank, stage, min(done, total), total))
            self._progress_sent = now

    # --- the loop ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until every rank has been told to shut down."""
        asleep, hold = True, False
        while True:
            self._mark("idle" if asleep else "take")
            messages = self.link.receive(asleep, self._send_stats)
            self._mark("take")
            self._take(messages)
            self._mark("results")
            self.pipeline.before_schedule()
            self._mark("schedule")
            batch = self.scheduler.schedule(hold)
            self._mark("agree")
            agreed = self._agree(batch)
            asleep, hold = agreed.asleep, self._balance.hold(agreed.by_dp)
            if self.part is not None:
                self._tell(self.part.apply(agreed.arrived, agreed.lost))
            if self.eplb is not None:
                self.eplb.turn(agreed.experts, self._launched)
            if any(agreed.ctx.dp_tokens):
                self._mark("step")
                self._step(batch, agreed.ctx)
            else:
                self.pipeline.drain()
                if self.eplb is not None and any(agreed.experts):
                    self.eplb.nap()
                elif not asleep:
                    self.link.pause()
            self._mark("reply")
            if agreed.controls:
                self.pipeline.drain()  # they happen between two steps
            if agreed.controls and self.step_log is not None:
                self.step_log.flush()  # a dump is of everything until now
            if agreed.controls and self.part is not None:
                self.part.flush()
            for reply in self.control.apply(agreed.controls):
                self.link.send(reply)
            if asleep or time.monotonic() - self._stats_sent > STATS_S:
                self._send_stats()
            if agreed.shutdown:
                for open_one in (self.step_log, self.part, self.eplb):
                    if open_one is not None:
                        open_one.close()
                assert self._shutdown is not None, "agreed on, and not asked for here"
                self.link.send(ControlReply(self._shutdown.cid, self.rank, ok=True))
                self.peers.leave()
                return

    def _mark(self, phase: str) -> None:
        """Where this rank is in its turn, for its pulse: plain stores, no call into the system."""
        if (pulse := self.pulse) is None:
            return
        pulse.phase = phase
        if phase == "agree":
            pulse.turn += 1
            pulse.step, pulse.requests = self._steps, self.scheduler.num_running + self.scheduler.num_waiting

    def _agree(self, batch: Batch) -> Agreement:
        scheduler = self.scheduler
        arrived, lost = (0, 0) if self.part is None else self.part.poll()
        mine = Proposal(
            tokens=batch.num_tokens,
            logit_rows=batch.num_logit_rows,
            prefill=bool(batch.prefill),
            first_half=split(batch)[0].num_tokens if self.args.engine.enable_two_batch_overlap else -1,
            busy=not scheduler.idle or (self.part is not None and self.part.busy),
            messages=self.link.messages_seen,
            controls=self.control.num_pending,
            shutdown=self._shutdown is not None,
            experts=self.eplb.proposal if self.eplb is not None else 0,
            prompts=scheduler.num_waiting,
            generating=len(batch.decode),
            slots=scheduler.max_running - scheduler.num_running,
            arrived=arrived,
            lost=lost,
        )
        return agree(self.groups.tp_cpu, self.dims, self._launched, mine)

    def _step(self, batch: Batch, ctx: StepContext) -> None:
        self.link.nap(self.control.forward_sleep_s)
        if self.recorder is not None:
            self.recorder.begin_pass(batch)
        self.pipeline.launch(batch, ctx)
        self._launched += 1
        if self.recorder is not None:
            self.recorder.end_of_pass()
        self.control.end_of_pass()

    def _over(self, step: Step) -> None:
        """Replies to a step whose tokens are there."""
        outputs = step.outputs
        if self.part is not None:
            outputs = self.part.stepped(step.batch, step.begin, outputs, step.settle)
        self._tell(outputs)
        self._steps += 1
        self._step_s += step.duration_s
        if self.step_log is not None:
            self.step_log.add(step.number, step.began, step.duration_s, step.batch, self.scheduler)

    # --- messages ---------------------------------------------------------------------------------

    def _take(self, received: list[ToRank]) -> None:
        """Acts on messages. What the scheduler sees comes from the DP group's leader, so that all of it stay equal."""
        for message in received:
            if isinstance(message, Control) and message.op == "shutdown":
                self._shutdown = message
            elif isinstance(message, Control):
                self.control.take(message)
        for message in self._share([m for m in received if isinstance(m, Generate | Abort | Handover)]):
            if isinstance(message, Generate | Handover):
                refused = self._start(message)
                self._tell([refused] if refused is not None else [])
            elif isinstance(message, Abort):
                (self.part or self.scheduler).abort(message.rid)

    def _start(self, message: Generate | Handover) -> Output | None:
        """Takes a request on; its final output when it cannot be served."""
        if self.part is not None:
            return self.part.take(message)
        assert isinstance(message, Generate), f"{message} is for a decode worker"
        return self.scheduler.add(message.rid, message.prompt, message.sampling, message.generated)

    def _tell(self, outputs: list[Output]) -> None:
        if outputs and self.leads:
            self.link.send(Outputs(self.dp_rank, outputs))

    def _share(self, messages: list[ToRank]) -> list[ToRank]:
        comm = self.groups.attn_tp_cpu
        if comm.size == 1:
            return messages
        data = comm.broadcast_bytes(msgspec.msgpack.encode(messages) if self.leads else b"")
        return msgspec.msgpack.decode(data, type=list[ToRank])

    def _send_stats(self) -> None:
        self._stats_sent = time.monotonic()
        if not self.leads:
            return
        eplb = self.eplb if self.rank == 0 else None
        stats = stats_of(self.dp_rank, self.scheduler, self._steps, self._step_s, self.recorder, eplb)
        self.link.send(stats)


def main() -> None:
    parser = argparse.ArgumentParser(description="One engine rank. Started by the launcher.")
    parser.add_argument("--args", required=True, help="JSON file with WorkerArgs (toolkit/engine/args.py)")
    parser.add_argument("--rank", required=True, type=int)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to handle
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # its stacks, on demand
    args = read_worker_args(options.args)
    torch.set_num_threads(args.cpu_threads)
    link = Link(args, options.rank, run_token())
    try:
        worker = Worker(args, options.rank, link)
        worker.run()
    except Exception as error:
        log.exception("rank %d failed", options.rank)
        link.send(Failed(options.rank, f"{type(error).__name__}: {error}"))
        link.close()
        sys.stdout.flush()
        os._exit(1)  # not through destroy_process_group: peers may never answer; they see that this one is gone
    link.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
