"""``python -m toolkit.engine.frontend --args FILE``: one frontend process, until SIGTERM or SIGINT.

FILE is a ``FrontendArgs`` JSON; the run's token is in the environment. Read next: ``server.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import logging
import os
import signal
import sys

import msgspec
import uvloop

from toolkit.engine.args import FrontendArgs, read_frontend_args, run_token
from toolkit.engine.frontend.server import Server, api_key


async def serve(args: FrontendArgs) -> None:
    server = Server(args, run_token(), api_key(args))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    await server.start()
    await stop.wait()
    logging.getLogger(__name__).info("stopping")
    await server.stop()


def forgo_torch() -> None:
    """Lets transformers find no torch in this process, which only tokenizes: half of its start and of its memory."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # what an import of it then finds
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that no model can be loaded here


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m toolkit.engine.frontend", description=__doc__)
    parser.add_argument("--args", required=True, metavar="FILE", help="FrontendArgs as JSON")
    options = parser.parse_args()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # its stacks, on demand
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    forgo_torch()
    try:
        uvloop.run(serve(read_frontend_args(options.args)))
    except (ValueError, OSError, msgspec.MsgspecError) as error:
        sys.stderr.write(f"frontend: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
