"""Whether this system stamps received bytes."""

from __future__ import annotations

import socket
import sys
import time

from toolkit.loadgen.exchange import TIMESPEC
from toolkit.loadgen.receive import SO_TIMESTAMPNS

ANCILLARY_BYTES = socket.CMSG_SPACE(16)


def kernel_stamps_work() -> bool:
    """Whether this system stamps received bytes of a TCP connection; tried on a loopback connection.

    Linux turns stamping on in the background when the first socket asks for it, so the first bytes may have none.
    """
    if sys.platform != "linux":
        return False
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as one:
        other, _ = listener.accept()
        with other:
            try:
                one.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
            except OSError:
                return False
            one.settimeout(1.0)
            for _ in range(50):
                other.sendall(b"x")
                ancillary = one.recvmsg(1, ANCILLARY_BYTES)[1]
                if any(level == socket.SOL_SOCKET and len(data) == TIMESPEC.size for level, _, data in ancillary):
                    return True
                time.sleep(0.002)
    return False
