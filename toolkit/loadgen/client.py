"""Which transport a run uses, and why: the choice that ``transport=auto`` makes.

Read next: ``sockets.py`` (kernel stamps) and ``http_client.py`` (everything else).
"""

from __future__ import annotations

import ipaddress
import os
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from toolkit.loadgen.receive.stamps import kernel_stamps_work

Transport = Literal["socket", "aiohttp"]


def choose_transport(asked: Literal["auto", "socket", "aiohttp"], url: str) -> tuple[Transport, str]:
    """The transport for a server, and the reason in words.

    Raises:
        ValueError: ``transport=socket`` was asked for and cannot reach this server.
    """
    reason = _why_not_socket(url)
    if asked == "socket" and reason:
        raise ValueError(f"transport=socket does not work here: {reason}; use transport=aiohttp, or auto")
    if asked == "aiohttp" or reason:
        return "aiohttp", reason or "as asked; stamps are taken when the process has the bytes"
    return "socket", "stamps are the kernel's"


def leave_out_of_proxies(url: str) -> None:
    """A server on this machine is not reached through a proxy, whatever the environment says of others."""
    host = urlsplit(url).hostname or ""
    try:
        here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost"
    if here:
        for name in ("no_proxy", "NO_PROXY"):
            os.environ[name] = ",".join(filter(None, [os.environ.get(name, ""), host]))


def _why_not_socket(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme != "http":
        return f"{parts.scheme} is encrypted, and kernel stamps are of encrypted bytes"
    if "http" in getproxies() and not proxy_bypass(parts.hostname or ""):
        return "a proxy is set in the environment"
    return "" if kernel_stamps_work() else "this system does not stamp received bytes"
