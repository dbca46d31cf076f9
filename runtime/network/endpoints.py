"""Addresses of sockets between hosts: taken apart, looked up, told to others."""

from __future__ import annotations

import ipaddress
import socket as net
from typing import Any, Final, cast

import zmq

EVERYWHERE: Final = {"*": "0.0.0.0", "0.0.0.0": "0.0.0.0", "::": "::"}  # noqa: S104  named, not bound
"""Hosts that stand for every interface of a machine, to what libzmq calls them."""


def endpoint_of(socket: zmq.Socket[Any], advertise: str | None = None) -> str:
    """Return where a bound socket listens, as ``tcp://HOST:PORT``.

    Args:
        socket: It has been bound.
        advertise: Host by which others reach it, in place of the address that it was bound to.
    """
    endpoint = cast("bytes", socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()
    if advertise is None:
        return endpoint
    host = f"[{advertise}]" if ":" in advertise else advertise
    return f"tcp://{host}:{endpoint.rpartition(':')[2]}"


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``tcp://HOST:PORT``; the brackets of an IPv6 address are left out.

    Raises:
        ValueError: It is no such address.
    """
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 1 << 16
    if not (address.startswith("tcp://") and host and colon and is_port and host.isprintable() and " " not in host):
        raise ValueError(f"address {address!r}: expected tcp://HOST:PORT, as in tcp://127.0.0.1:0 or tcp://[::1]:0")
    return host, int(port)


def is_loopback(address: str) -> bool:
    """Whether ``tcp://HOST:PORT`` can be reached from this machine only."""
    resolved, _ = resolve(address)
    return ipaddress.ip_address(split_address(resolved)[0].partition("%")[0]).is_loopback


def resolve(address: str, *, is_passive: bool = True) -> tuple[str, bool]:
    """Return the address with its host as a number, and whether that is of IPv6; looking up a name may block.

    Args:
        address: ``tcp://HOST:PORT``; paths are returned as they are.
        is_passive: To bind: ``*`` stands for every interface.

    Raises:
        ValueError: The address is malformed, or its host cannot be found.
    """
    if address.startswith(("ipc://", "inproc://")):
        return address, False
    host, port = split_address(address)
    if is_passive and host in EVERYWHERE:
        found = EVERYWHERE[host]
    else:
        try:
            found = str(net.getaddrinfo(host, port, type=net.SOCK_STREAM)[0][4][0])
        except (OSError, UnicodeError) as error:
            raise ValueError(f"address {address!r}: host {host!r} cannot be found ({error})") from error
    is_ipv6 = ":" in found
    return f"tcp://[{found}]:{port}" if is_ipv6 else f"tcp://{found}:{port}", is_ipv6
