"""Ends connections from outside of the library that uses them: which sockets of this process belong to a group.

Gloo has no way to release an operation that waits for a dead process: most of the others wait for it through a third.
What does release all of them is an end of the group's own connections. A socket belongs to a group if one of its two
ends is a listener of the group, which every member has told to all before any of them connects.

All of this works on copies of the descriptors, so one that is closed or used again meanwhile is never mistaken.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

Address = tuple[str, int]
"""Host and port of one end of a connection."""


@lru_cache(maxsize=64)
def numeric(host: str) -> str:
    """Return the IP address of a host, which is asked for once, and only where ``host`` is a name.

    Raises:
        OSError: Nobody knows the name.
    """
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])


def own_listeners(host: str | None) -> set[Address]:
    """Return the addresses that this process listens on: those on ``host``, an IP address, or all of them."""
    found: set[Address] = set()
    for each in _own_sockets():
        if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            name = each.getsockname()[:2]
            if host is None or name[0] == host:
                found.add(name)
    return found


def unreachable(listeners: Sequence[Address]) -> list[int]:
    """Return which of a group's members listen on their own host's loopback, though others listen elsewhere.

    Where all of them do, all are on one machine.
    """
    loops = [ipaddress.ip_address(host.partition("%")[0]).is_loopback for host, _ in listeners]
    return [] if all(loops) else [place for place, loop in enumerate(loops) if loop]


def cut(listeners: Collection[Address]) -> int:
    """Shut down, in both directions, every connection of this process with an end at ``listeners``; return how many.

    Listeners themselves stay: Gloo ends the process when one of its own fails.
    """
    num_cut = 0
    for each in _own_sockets():
        with contextlib.suppress(OSError):
            if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                continue
            if each.getsockname()[:2] in listeners or each.getpeername()[:2] in listeners:
                each.shutdown(socket.SHUT_RDWR)
                num_cut += 1
    return num_cut


def answer_for_missing(listener: Address, tickets: Sequence[int]) -> None:
    """Connect to our own Gloo ``listener`` in the place of members that never will, and hang up.

    A member that waits for another to connect waits for five times its timeout, whatever becomes of the other. Who
    connects first sends the 8 bytes of the ticket that it was given, by which Gloo knows for which pair it comes.
    """
    for ticket in tickets:
        with contextlib.suppress(OSError), socket.create_connection(listener, timeout=0.2) as caller:
            caller.sendall(struct.pack("=q", ticket))


def tickets_in(published: bytes, size: int) -> tuple[int, ...]:
    """Read the tickets, one for each of ``size`` members, that end what Gloo publishes of a member in the store."""
    tail = 8 * size
    return struct.unpack(f"={size}q", published[-tail:]) if len(published) > tail else ()


def _own_sockets() -> Iterator[socket.socket]:
    """Copies of this process's TCP sockets, one at a time."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            each = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            # Closed meanwhile.
            continue
        with each:
            if each.family in {socket.AF_INET, socket.AF_INET6} and each.type == socket.SOCK_STREAM:
                yield each
