"""One process on each node of a Slurm run: finds the node's address, holds its ports, and says so in one line.

``python -m toolkit.launch.node '{"peers": ["node1", "node2"], ...}'`` as a job step, one task a node. It stays until
its standard input ends, because a claim on ports lasts as long as the process that made it. Needs no torch and no
toolkit environment beyond this package. Started by ``slurm.py``, which reads the line.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import NamedTuple

import msgspec
import psutil

from toolkit.launch import ports

SAYS = "toolkit-node "  # begins the line; what else a task prints is not ours


class Ask(msgspec.Struct, frozen=True):
    """What a node is asked.

    Attributes:
        names: every node of the run, as Slurm calls it.
        peers: where each of them is reached, in the same order: a name or an address.
        num_ports: ports to hold. With ``port`` above 0 they begin there and only have to be free.
        interface: network interface whose address is wanted; empty: the one that leads to the other nodes.
    """

    names: list[str]
    peers: list[str]
    num_ports: int
    port: int = 0
    interface: str = ""


class Answer(msgspec.Struct, frozen=True):
    """What a node says; ``error`` in place of the rest when it cannot take part."""

    name: str
    host: str = ""
    port: int = 0
    interface: str = ""
    error: str = ""


class Address(NamedTuple):
    host: str
    interface: str


def main() -> int:
    ask = msgspec.json.decode(sys.argv[1], type=Ask)
    name = os.environ["SLURMD_NODENAME"]
    held: ports.Claim | None = None
    try:
        where = address(ask, name)
        held = None if ask.port else ports.claim(ask.num_ports)
        answer = Answer(name, where.host, held.first if held else _fixed(ask), where.interface)
    except (ValueError, OSError) as error:
        answer = Answer(name, error=str(error))
    os.write(1, f"{SAYS}{msgspec.json.encode(answer).decode()}\n".encode())
    if answer.error:
        return 1
    while os.read(0, 4096):
        pass
    if held:
        held.close()
    return 0


def address(ask: Ask, name: str) -> Address:
    """Where other nodes reach this one. Raises ``ValueError`` with a way out."""
    if ask.interface:
        return Address(_address_of(ask.interface), ask.interface)
    if len(ask.names) == 1:
        return Address("127.0.0.1", "")
    peer = ask.peers[(ask.names.index(name) + 1) % len(ask.peers)]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))  # sends nothing: the kernel only chooses the way
        except OSError as error:
            raise ValueError(
                f"{name} knows no way to {peer} ({error}): set cluster.network_interface to the interface between "
                f"nodes, one of: {', '.join(sorted(psutil.net_if_addrs()))}"
            ) from None
        host = probe.getsockname()[0]
    return Address(host, _interface_of(host))


def _fixed(ask: Ask) -> int:
    for port in range(ask.port, ask.port + ask.num_ports):
        if not ports.is_free(port):
            raise ValueError(
                f"cluster.port={ask.port}: port {port} is in use{ports.owner(port)}: use another, or 0 to have free "
                "ones chosen on each node"
            )
    return ask.port


def _address_of(interface: str) -> str:
    known = psutil.net_if_addrs()
    for entry in known.get(interface, []):
        if entry.family == socket.AF_INET:
            return entry.address
    why = "has no IPv4 address" if interface in known else "is not there"
    raise ValueError(f"cluster.network_interface={interface} {why}: use one of: {', '.join(sorted(known))}")


def _interface_of(host: str) -> str:
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == host for entry in entries):
            return name
    return ""


if __name__ == "__main__":
    sys.exit(main())
