"""``python -m toolkit.loadgen``: options -> is the server there -> sweep -> table. Owns signals and the exit status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.loadgen.datasets import Dataset
    from toolkit.loadgen.ledger import Ledger
    from toolkit.loadgen.options import Options
    from toolkit.loadgen.progress import Reporter
    from toolkit.loadgen.sweep import Sweep

BAD_OPTIONS = 2
NOT_TRUSTWORTHY = 3  # strict=true, and the client's own part in the figures is not ok
SERVER_GONE = 4
EXIT = {"done": 0, "failed": 1, "cancelled": 130}

log = logging.getLogger("toolkit.loadgen")


class _Stderr(logging.Handler):
    """Writes to what ``sys.stderr`` is at the moment: rich replaces it while progress bars are on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def main(words: Sequence[str]) -> int:
    """Runs the command line ``words``; returns the exit status."""
    from toolkit.loadgen.datasets import DATASETS
    from toolkit.loadgen.ledger import Ledger
    from toolkit.loadgen.options import help_text, parse

    if not words or (words[0] not in ("selfcheck", "join") and {"-h", "--help", "help"} & set(words)):
        sys.stdout.write(help_text() + "\n")
        return 0
    if words[0] == "selfcheck":
        from toolkit.loadgen import selfcheck

        return selfcheck.main(words[1:])
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S", handlers=[_Stderr()]
    )
    if words[0] == "join":
        from toolkit.loadgen import join

        return join.main(words[1:])
    try:
        options = parse(words)
        if options.nodes > 1 and int(os.environ.get("SLURM_PROCID", "0")):
            from toolkit.loadgen import join

            return join.main([options.listen])  # one job step with the same command on every node
        dataset = DATASETS[options.dataset](options, options.tokenizer)
        ledger = Ledger(options)
        if options.out:
            _make_folder(Path(options.out))
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return BAD_OPTIONS
    import uvloop

    from toolkit.heartbeat import beating

    alone = options.out and not options.deployment  # else the launcher gives the signs of life
    signs = beating(Path(options.out)) if alone else contextlib.nullcontext()
    with signs, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(options, dataset, ledger))


async def _run(options: Options, dataset: Dataset, ledger: Ledger) -> int:
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)

    import pandas  # noqa: F401  its half second is spent here, not between two load points

    from toolkit.loadgen.pool import WorkerError
    from toolkit.loadgen.probe import ServerError
    from toolkit.loadgen.progress import ProgressBars, ProgressFile
    from toolkit.loadgen.summary import render
    from toolkit.loadgen.sweep import Sweep

    sweep = Sweep(options, ledger)
    reporter = ProgressFile(Path(options.progress)) if options.progress else ProgressBars()
    try:
        with reporter:
            await _sweep(sweep, options, dataset, reporter)
    except (ServerError, ValueError, WorkerError) as error:
        ledger.close("failed", str(error))
        log.error("%s", error)
        return EXIT["failed"]
    except asyncio.CancelledError:
        if sweep.status.state == "running":  # else the sweep has dealt with it, or had ended before
            ledger.close("cancelled", "interrupted before the first load point")
    sys.stdout.write(render(sweep.rows, sweep.status))
    if options.out:
        log.info("results: %s", options.out)
    if sweep.gone:
        return SERVER_GONE
    if options.strict and sweep.status.state == "done" and not sweep.trustworthy:
        log.error("strict=true, and the load generator's own part in the figures is not ok at every load point")
        return NOT_TRUSTWORTHY
    return EXIT[sweep.status.state]


async def _sweep(sweep: Sweep, options: Options, dataset: Dataset, reporter: Reporter) -> None:
    """Finds the model, starts the processes, runs the sweep."""
    from toolkit.loadgen.around import Around
    from toolkit.loadgen.client import choose_transport, leave_out_of_proxies
    from toolkit.loadgen.groups import groups
    from toolkit.loadgen.join import read_token
    from toolkit.loadgen.links import parse_address
    from toolkit.loadgen.openai_api import PATHS, server_of
    from toolkit.loadgen.points import CallMaker, most_in_flight
    from toolkit.loadgen.pool import Member, Pool, allowed_cores, pinned, share_of_cores
    from toolkit.loadgen.probe import find_model, open_session
    from toolkit.loadgen.server import ServerWatch
    from toolkit.loadgen.wire import Setup

    url = server_of(options.url)
    leave_out_of_proxies(url)
    transport, reason = choose_transport(options.transport, url)
    in_flight = -(-most_in_flight(options) // options.nodes)  # of a node
    workers = options.workers or share_of_cores(len(allowed_cores()), in_flight)
    log.info("%d process(es) send, transport=%s: %s", workers, transport, reason)
    setup = Setup(
        url=url + PATHS[options.endpoint],
        transport=transport,
        timeout_s=options.timeout_s,
        api_key_env=options.api_key_env,
        headers=options.headers,
        record_text=options.record_text,
        record_raw=options.record_raw,
    )
    async with contextlib.AsyncExitStack() as opened:
        session = await opened.enter_async_context(open_session(os.environ.get(options.api_key_env, "")))
        model = await find_model(session, url, options.model)
        others: list[Member] = []
        if options.nodes > 1:
            address = parse_address(options.listen, "listen")
            joining = groups(address, read_token(), options.nodes - 1, setup, options.workers, in_flight, options.pin)
            others = [worker for group in await opened.enter_async_context(joining) for worker in group.workers]
        around = await opened.enter_async_context(Around(session, url, options))
        folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="loadgen-"))
        pool = await opened.enter_async_context(Pool(pinned(setup, workers, options.pin), Path(folder), others))
        server = ServerWatch(session, url, options.gone_s)
        await sweep.run(pool, CallMaker(options, dataset, model), transport, around, server, reporter)


def _make_folder(folder: Path) -> None:
    """Raises ``ValueError`` when the folder cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={folder} cannot be made: {error.strerror}; give a folder you may write to") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
