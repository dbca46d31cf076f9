"""Looks at names, ports and the place for sockets."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.config import plain_bulk, socket_root, use_nixl
from .check import Check, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SLOW_LOOKUP_S = 0.2
LOOKUP_LIMIT_S = 2.0
# sun_path holds 108 bytes; the runtime adds the job's directory and the name of a proc to the root.
MAX_ROOT_LENGTH = 48
_MAPPED = "::ffff:127.0.0.1"


def check_network() -> Iterator[Check]:
    """Yield a finding for each thing that sockets and process groups depend on."""
    yield check_socket_directory(socket_root())
    yield check_loopback()
    yield check_port_range()
    yield check_own_name()
    yield check_streams(is_plain=plain_bulk(), has_nixl=use_nixl())
    yield check_reverse_lookup(_read(Path("/etc/hosts")), _read(Path("/etc/nsswitch.conf")), _time(_reverse_lookup))


def check_socket_directory(root: str) -> Check:
    """The directory in which every job makes its own for its sockets."""
    if not os.access(root, os.W_OK | os.X_OK):
        fix = "set DANAUS_SOCKET_DIR to a short private path"
        return Check("sockets", Status.MISSING, f"{root} cannot be written", fix)
    wanted = os.environ.get("DANAUS_SOCKET_DIR", "")
    if len(wanted) > MAX_ROOT_LENGTH:
        fix = f"choose a path of at most {MAX_ROOT_LENGTH} characters"
        return Check("sockets", Status.WARNING, f"DANAUS_SOCKET_DIR is too long for socket names; using {root}", fix)
    return Check("sockets", Status.OK, f"in {root}")


def check_loopback() -> Check:
    """A TCP connection to this machine itself."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            socket.create_connection(("127.0.0.1", port), timeout=LOOKUP_LIMIT_S).close()
    except OSError as error:
        fix = "bring the loopback interface up: ip link set lo up"
        return Check("loopback", Status.WARNING, f"TCP to 127.0.0.1 fails: {error}; Gloo needs it", fix)
    return Check("loopback", Status.OK, "TCP to 127.0.0.1 works")


def check_streams(*, is_plain: bool, has_nixl: bool) -> Check:
    """What large values between hosts travel by."""
    switches = [name for name, is_on in (("DANAUS_PLAIN_BULK", is_plain), ("DANAUS_NIXL", has_nixl)) if is_on]
    if switches:
        fix = f"unset {' and '.join(switches)} unless nobody else is on that network"
        return Check("streams", Status.WARNING, "large values travel between hosts unencrypted", fix)
    if importlib.util.find_spec("cryptography") is None:
        return Check("streams", Status.WARNING, "no certificates can be made", "pip install 'danaus[hosts]'")
    return Check("streams", Status.OK, "TLS 1.3 between hosts")


def check_port_range() -> Check:
    """The ports that the kernel hands out; nothing in Danaus has a fixed one."""
    fields = _read(Path("/proc/sys/net/ipv4/ip_local_port_range")).split()
    if len(fields) != 2:
        return Check("ports", Status.OK, "chosen by the kernel")
    low, high = map(int, fields)
    if high - low < 1000:
        fix = "sysctl net.ipv4.ip_local_port_range='32768 60999'"
        return Check("ports", Status.WARNING, f"the kernel may choose from {low} to {high} only", fix)
    return Check("ports", Status.OK, f"chosen by the kernel from {low} to {high}; none is fixed")


def check_own_name() -> Check:
    """Whether this host's name leads to an address; Gloo listens on it unless told otherwise."""
    name = socket.gethostname()
    took_s, found = _time(lambda: str(socket.getaddrinfo(name, None)[0][4][0]))
    if found is None or took_s > SLOW_LOOKUP_S:
        fix = f"add a line to /etc/hosts: 127.0.0.1 {name}"
        detail = f"{name} leads nowhere" if found is None else f"{name} took {took_s:.1f} s to look up"
        return Check("host name", Status.WARNING, f"{detail}; torch.distributed looks it up", fix)
    return Check("host name", Status.OK, f"{name} is {found}")


def check_reverse_lookup(hosts: str, nsswitch: str, timed: tuple[float, str | None]) -> Check:
    """Whether a name server is asked for the name of 127.0.0.1 when torch's TCPStore is used.

    Args:
        hosts: Text of /etc/hosts.
        nsswitch: Text of /etc/nsswitch.conf.
        timed: Seconds that one look-up took, and its answer.
    """
    took_s, _ = timed
    if took_s > SLOW_LOOKUP_S:
        detail = f"the name of {_MAPPED} took {took_s:.1f} s to look up"
    elif _asks_name_server(nsswitch) and not _lists_mapped(hosts):
        detail = f"a name server is asked for {_MAPPED} ({took_s * 1000:.0f} ms now; 5 s whenever a packet is lost)"
    else:
        return Check("reverse names", Status.OK, f"{_MAPPED} is answered without a name server")
    fix = f"add a line to /etc/hosts: {_MAPPED} localhost (torch's TCPStore asks at every connection, Danaus never)"
    return Check("reverse names", Status.WARNING, detail, fix)


def _lists_mapped(hosts: str) -> bool:
    wanted = ipaddress.ip_address(_MAPPED)
    for line in hosts.splitlines():
        fields = line.partition("#")[0].split()
        try:
            if len(fields) > 1 and ipaddress.ip_address(fields[0]) == wanted:
                return True
        except ValueError:
            continue
    return False


def _asks_name_server(nsswitch: str) -> bool:
    for line in nsswitch.splitlines():
        name, _, services = line.partition("#")[0].partition(":")
        if name.strip() == "hosts":
            return bool({"dns", "resolve"} & set(services.split()))
    return True


def _reverse_lookup() -> str:
    return socket.getnameinfo((_MAPPED, 0, 0, 0), 0)[0]


def _time(call: Callable[[], str], limit_s: float = LOOKUP_LIMIT_S) -> tuple[float, str | None]:
    """Wait for ``call`` for at most ``limit_s``; return how long it took and its answer, None where it has none."""
    answers: list[str] = []

    def run() -> None:
        with contextlib.suppress(OSError):
            answers.append(call())

    started_s = time.monotonic()
    thread = threading.Thread(target=run, name="doctor-lookup", daemon=True)
    thread.start()
    thread.join(limit_s)
    return time.monotonic() - started_s, answers[0] if answers else None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
