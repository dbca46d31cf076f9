"""Several hosts on one machine: a network namespace each, joined by a switch, and the ways to break what is between.

The test's own process is a host of that network as well, under the address ``Network.here``. Names carry the pid, so
several runs do not meet; what a run that was killed left behind is removed by the next one.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import socket
import subprocess
import threading
from dataclasses import dataclass
from itertools import count
from typing import Self

LIMIT_S = 20.0
NETWORK = "198.18.{}"
"""Of the range that is set aside for measuring networks: no real host has such an address."""

_CLONE_NEWNET = 0x40000000
_NAME = re.compile(r"\b(dt(\d+)n\d+)[a-z]\d*\b")
_numbers = count()


def missing() -> str | None:
    """What this machine lacks to run such tests; None where it lacks nothing."""
    if os.getuid() != 0:
        return "network namespaces need root"
    lacking = [tool for tool in ("ip", "iptables", "nsenter", "ss") if shutil.which(tool) is None]
    if lacking:
        return f"{', '.join(lacking)} not found (iproute2, iptables, util-linux)"
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    return f"no network namespaces: {probe.stderr.strip()}" if probe.returncode else None


@dataclass(frozen=True)
class Host:
    """One host; ``namespace`` is None for the one that the test's own process is."""

    namespace: str | None
    address: str
    port: str
    """The switch's end of this host's cable."""

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs ``words`` on this host, in a process of the same pid."""
        # `ip netns exec` would also mount another /sys, without cgroups.
        return [*words] if self.namespace is None else ["nsenter", f"--net=/run/netns/{self.namespace}", *words]

    def open_socket(self) -> socket.socket:
        """Return a TCP socket of this host for use in this process."""
        made: list[socket.socket | OSError] = []
        # A thread has a namespace of its own, a socket keeps the one that it was made in.
        thread = threading.Thread(target=self._open_socket, args=(made,), name="namespace")
        thread.start()
        thread.join(LIMIT_S)
        if isinstance(made[0], OSError):
            raise made[0]
        return made[0]

    def _open_socket(self, made: list[socket.socket | OSError]) -> None:
        try:
            if self.namespace is not None:
                _enter(self.namespace)
            made.append(socket.socket())
        except OSError as error:
            made.append(error)


class Network:
    """``num_hosts`` hosts and this process, all on one switch; use it in a ``with`` block, which removes everything."""

    def __init__(self, num_hosts: int) -> None:
        remove_stale()
        self._prefix = f"dt{os.getpid()}n{next(_numbers)}"
        self._switch = f"{self._prefix}s"
        subnet = _free_subnet()
        self.subnet = f"{subnet}.0/24"
        self.here = Host(None, f"{subnet}.1", f"{self._prefix}p0")
        self.hosts = tuple(
            Host(f"{self._prefix}h{number}", f"{subnet}.{1 + number}", f"{self._prefix}p{number}")
            for number in range(1, num_hosts + 1)
        )
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def cut(self, host: Host) -> None:
        """Pull the cable of ``host``."""
        _run("ip", "-n", self._switch, "link", "set", host.port, "down")

    def drop(self, source: Host, dest: Host) -> None:
        """Lose every packet from ``source`` to ``dest``; those the other way pass."""
        # In a namespace, so that no rule is ever made for the machine itself.
        if dest.namespace is not None:
            _run(*dest.command("iptables", "-w", "-A", "INPUT", "-s", source.address, "-j", "DROP"))
        elif source.namespace is not None:
            _run(*source.command("iptables", "-w", "-A", "OUTPUT", "-d", dest.address, "-j", "DROP"))

    def lose(self, host: Host, probability: float) -> None:
        """Lose packets to ``host`` (in a namespace) at random."""
        assert host.namespace is not None
        rule = ("-m", "statistic", "--mode", "random", "--probability", f"{probability:f}", "-j", "DROP")
        _run(*host.command("iptables", "-w", "-A", "INPUT", *rule))

    def heal(self) -> None:
        """Undo every cut, drop and loss."""
        for host in (self.here, *self.hosts):
            _run("ip", "-n", self._switch, "link", "set", host.port, "up")
            if host.namespace is not None:
                _run(*host.command("iptables", "-w", "-F"))

    def kill_connections(self, host: Host) -> None:
        """Reset every TCP connection of ``host`` within this network."""
        # It kills them and says that it could not, on some kernels.
        subprocess.run(
            host.command("ss", "--kill", "--tcp", "state", "connected", "dst", self.subnet),
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )

    def close(self) -> None:
        """Remove the hosts, the switch and every cable; processes that still run there keep their sockets."""
        _remove(self._prefix)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self) -> None:
        names = [host.namespace for host in self.hosts if host.namespace is not None]
        _batch([f"netns add {name}" for name in (self._switch, *names)])
        lines = ["link set lo up", "link add name switch type bridge", "link set switch up"]
        _batch(lines, namespace=self._switch)
        cables = [
            f"link add {host.port} netns {self._switch} type veth peer name {self._end_of(host)}"
            + (f" netns {host.namespace}" if host.namespace else "")
            for host in (self.here, *self.hosts)
        ]
        _batch(cables)
        _batch([f"link set {host.port} master switch up" for host in (self.here, *self.hosts)], namespace=self._switch)
        for host in (self.here, *self.hosts):
            end = self._end_of(host)
            lines = [f"addr add {host.address}/24 dev {end}", f"link set {end} up"]
            _batch(["link set lo up", *lines] if host.namespace else lines, namespace=host.namespace)

    def _end_of(self, host: Host) -> str:
        return "eth0" if host.namespace else f"{self._prefix}e"


def _enter(namespace: str) -> None:
    """Move the calling thread there."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns({namespace})")


def remove_stale() -> None:
    """Remove the networks of processes that have died without doing so."""
    for prefix, pid in set(_NAME.findall(_run("ip", "netns", "list"))):
        if not os.path.exists(f"/proc/{pid}"):
            _remove(prefix)


def _remove(prefix: str) -> None:
    """Remove the namespaces and cables of one network, as far as they are there."""
    own = re.compile(rf"\b{prefix}[a-z]\d*\b")
    namespaces = set(own.findall(_run("ip", "netns", "list")))
    switch = f"{prefix}s"
    if switch in namespaces:
        # A cable ends with either of its ends. Left to the namespaces, those would go late, or with the last process.
        ports = set(re.findall(rf"\b{prefix}p\d+\b", _run("ip", "-n", switch, "-o", "link")))
        _batch([f"link delete {port}" for port in ports], namespace=switch)
    # The switch goes last: as long as it is there, a removal that failed can be tried again.
    _batch([f"netns delete {name}" for name in sorted(namespaces - {switch})])
    _batch([f"netns delete {name}" for name in namespaces & {switch}])


def _free_subnet() -> str:
    taken = _run("ip", "-o", "-4", "address")
    numbers = ((os.getpid() + step) % 254 + 1 for step in range(254))
    return next(NETWORK.format(number) for number in numbers if NETWORK.format(number) + "." not in taken)


def _run(*words: str, text: str | None = None) -> str:
    done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _batch(lines: list[str], *, namespace: str | None = None) -> None:
    _run(*(["ip", "-n", namespace] if namespace else ["ip"]), "-batch", "-", text="\n".join(lines))
