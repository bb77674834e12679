"""``python -m toolkit.engine.frontend --args FILE``: one frontend process, until SIGTERM or SIGINT.

FILE is a ``FrontendArgs`` JSON; the run's token is in the environment. With ``api_servers`` it starts more of this
command for itself, which end with it. Read next: ``server.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import logging
import os
import signal
import socket
import sys

import msgspec
import uvloop

from toolkit.engine.args import FrontendArgs, read_frontend_args, run_token
from toolkit.engine.frontend import api_server
from toolkit.engine.frontend.server import Server, api_key


async def serve(args: FrontendArgs) -> int:
    server = Server(args, run_token(), api_key(args))
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    server.broken.add_done_callback(lambda _: stop.set())
    await server.start()
    await stop.wait()
    logging.getLogger(__name__).info("stopping")
    await server.stop()
    return int(server.broken.done())


def serve_api(fd: int) -> None:
    """Signals to the whole group of processes are for the frontend: it ends this one."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    uvloop.run(api_server.serve(socket.socket(fileno=fd)))


def forgo_torch() -> None:
    """Lets transformers find no torch in this process, which only tokenizes: half of its start and of its memory."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # what an import of it then finds
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that no model can be loaded here


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m toolkit.engine.frontend", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--args", metavar="FILE", help="FrontendArgs as JSON")
    what.add_argument("--api-server", type=int, metavar="FD", help="an API server of the frontend at this socket")
    options = parser.parse_args()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # its stacks, on demand
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    forgo_torch()
    try:
        if options.api_server is not None:
            serve_api(options.api_server)
            return 0
        code: int = uvloop.run(serve(read_frontend_args(options.args)))
        return code
    except (ValueError, OSError, msgspec.MsgspecError) as error:
        sys.stderr.write(f"frontend: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
