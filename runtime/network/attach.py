"""Joins hosts to the controller's job: the daemons that run there are asked for an agent each."""

from __future__ import annotations

import itertools
import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ..address import CONTROLLER
from ..calls.future import Future, _run_apart
from ..context import local_proc
from ..errors import DanausError
from ..host_mesh import Host, HostMesh
from ..shapes.shape import Extent
from ..workspace.errors import VersionMismatch
from ..workspace.sync import sync_again
from ..workspace.versions import compare, own_versions
from .endpoints import split_address
from .keys import SECRET_BYTES, read_key_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ..proc import LocalProc

ATTACH_S: Final = 60.0
"""Default time for hosts to answer."""


RELEASE_S: Final = 20.0
"""Time for the agents of hosts to end."""


class AttachError(DanausError):
    """Hosts did not answer, or refused; nothing is attached.

    Attributes:
        failed: Address of each of these hosts, and why.
    """

    def __init__(self, failed: dict[str, str]) -> None:
        super().__init__(failed)
        self.failed = failed

    def __str__(self) -> str:
        lines = [f"  {address}: {why}" for address, why in self.failed.items()]
        return "\n".join([f"{len(self.failed)} of the hosts could not be attached, so none is:", *lines])


@dataclass(slots=True)
class _Attached:
    """One host, as the controller knows it."""

    address: str
    secret: bytes = field(repr=False)
    via: int
    life: int = 0
    name: str = ""
    lost: str = ""
    callbacks: list[Callable[[str], object]] = field(default_factory=list)


class AttachedHosts:
    """The hosts that a controller has attached to."""

    def __init__(self, local: LocalProc) -> None:
        self._local = local
        self._hosts: dict[int, _Attached] = {}
        self._slots = itertools.count(1)
        self._tokens = itertools.count(1)
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        local.on_event["attached"] = local.on_event["released"] = self._on_answered
        local.on_event["host_lost"] = self._on_host_lost

    def attach(
        self, addresses: Sequence[str], secret: bytes, *, name: str, timeout_s: float, gateway: str | None
    ) -> HostMesh:
        """See :func:`attach_to_hosts`."""
        via = 0
        if gateway is not None:
            via = self._find(gateway) or self._attach_all([gateway], secret, via=0, timeout_s=timeout_s)[0]
        taken = {gateway: via} if gateway is not None else {}
        slots = iter(self._attach_all([a for a in addresses if a not in taken], secret, via=via, timeout_s=timeout_s))
        hosts = [taken.get(address) or next(slots) for address in addresses]
        extent = Extent((name,), (len(hosts),))
        return HostMesh([Host(slot, self._hosts[slot].name) for slot in hosts], extent.region)

    def _find(self, address: str) -> int:
        return next((slot for slot, host in self._hosts.items() if host.address == address and not host.lost), 0)

    def _attach_all(self, addresses: Sequence[str], secret: bytes, *, via: int, timeout_s: float) -> list[int]:
        if not addresses:
            return []
        new = {next(self._slots): _Attached(address, secret, via) for address in addresses}
        self._ask(new, timeout_s, may_return=False)
        self._hosts |= new
        return list(new)

    def _ask(self, hosts: dict[int, _Attached], timeout_s: float, *, may_return: bool) -> None:
        token = next(self._tokens)
        answered: Future[dict[str, Any]] = Future(f"attaching {len(hosts)} hosts")
        self._waiting[token] = answered
        first = next(iter(hosts.values()))
        self._local.request(
            "attach",
            {
                "token": token,
                "hosts": [[slot, host.life, host.address] for slot, host in hosts.items()],
                "secret": first.secret,
                "timeout_s": timeout_s,
                "via": first.via,
                "may_return": may_return,
            },
        )
        try:
            answer = answered.get(timeout_s + 10)
        finally:
            self._waiting.pop(token, None)
        if answer["failed"]:
            raise AttachError(dict(answer["failed"]))
        self._local.host_address = answer["host_address"]
        found = {slot: (str(name), dict(versions)) for slot, name, versions in answer["hosts"]}
        differences = compare(own_versions(), {found[slot][0]: found[slot][1] for slot in found})
        if differences:
            self.release(list(hosts), shut_down=False)
            raise VersionMismatch(differences)
        for slot, host in hosts.items():
            host.name, host.lost = found[slot][0], ""

    def _on_answered(self, fields: dict[str, Any]) -> None:
        waiting = self._waiting.get(fields["token"])
        if waiting is not None:
            waiting._resolve(lambda: fields)

    def on_agent_gone(self, code: int) -> None:
        """The controller's own agent has ended, and with it the way to all others (I/O thread)."""
        for waiting in list(self._waiting.values()):
            waiting._reject(
                RuntimeError(f"the host agent of this machine ended with code {code}; see its output above")
            )
        for host in self._hosts.values():
            host.lost = host.lost or "the controller's own agent has ended"

    def release(self, slots: Sequence[int], *, shut_down: bool) -> None:
        """End this job's agents there, or the daemons; blocks until they have."""
        for slot in slots:
            self._hosts.pop(slot, None)
        token = next(self._tokens)
        answered: Future[dict[str, Any]] = Future("release of hosts")
        self._waiting[token] = answered
        self._local.request("detach", {"token": token, "slots": list(slots), "shut_down": shut_down})
        try:
            answered.get(RELEASE_S)
        finally:
            self._waiting.pop(token, None)

    def replace(self, slot: int, address: str, *, timeout_s: float) -> None:
        """Put another host in the place of a lost one; what was on it and has a policy is started there."""
        split_address(address)
        with self._lock:
            host = self.known(slot)
            if not host.lost:
                raise ValueError(f"host {host.name} is not lost; only a lost host can be replaced")
            new = _Attached(address, host.secret, host.via, host.life + 1, callbacks=host.callbacks)
            # Whatever comes of it, that number has been used.
            host.life += 1
            self._ask({slot: new}, timeout_s, may_return=bool(host.callbacks))
            self._hosts[slot] = new
            try:
                # Its ranks wait for the code that they run.
                sync_again(HostMesh([Host(slot, new.name)], Extent(("host",), (1,)).region), timeout=timeout_s)
            finally:
                self._local.request("host_ready", {"slot": slot})

    def give_up(self, slot: int) -> None:
        """No other host will take the place of a lost one: what waits for it fails."""
        self._local.request("give_up_host", {"slot": slot})

    def watch(self, slot: int, callback: Callable[[str], object]) -> None:
        """Have ``callback`` called with the reason when a host is lost; it may be replaced from then on."""
        host = self.known(slot)
        host.callbacks.append(callback)
        self._local.request("may_return", {"slot": slot})

    def is_attached(self, slot: int) -> bool:
        """Whether a host was attached, and not released since then."""
        return slot in self._hosts

    def known(self, slot: int) -> _Attached:
        """Return what is known of a host.

        Raises:
            RuntimeError: It was released, or attached by another process.
        """
        host = self._hosts.get(slot)
        if host is None:
            raise RuntimeError(f"host {slot} was stopped, or attached by another controller; attach to it again")
        return host

    def _on_host_lost(self, fields: dict[str, Any]) -> None:
        host = self._hosts.get(fields["slot"])
        if host is not None:
            host.lost = fields["why"]
            for callback in host.callbacks:
                _run_apart(lambda callback=callback: callback(fields["why"]))


def attach_to_hosts(
    addresses: Sequence[str],
    *,
    key: str | Path | bytes,
    name: str = "hosts",
    timeout: float = ATTACH_S,
    gateway: str | None = None,
) -> HostMesh:
    """Join hosts on which ``danaus host`` runs to this script's job, and return them as a mesh.

    Blocks until all have answered. The processes that are spawned on them end with this script; the daemons stay.

    Args:
        addresses: Of the daemons, as ``tcp://HOST:PORT``, in the order that they have in the mesh.
        key: Path of the key file that the daemons were started with, or its 32 bytes.
        name: Name of the mesh's only dimension.
        timeout: Seconds that they may take.
        gateway: Address of the one daemon that can be reached from here, if the others can only be reached from there.

    Raises:
        AttachError: Some did not answer in time, or refused; it names them, and nothing is attached.
        VersionMismatch: Python, danaus or torch are of other versions there.
        ValueError: An address is malformed or there twice.
        RuntimeError: This process is not the controller.
    """
    if isinstance(addresses, str) or not addresses:
        raise ValueError(f'attach_to_hosts({addresses!r}): expected a list, as ["tcp://node1:26600"]')
    for address in addresses:
        split_address(address)
    twice = {address for address in addresses if list(addresses).count(address) > 1}
    if twice:
        raise ValueError(f"attach_to_hosts: {sorted(twice)} more than once; a host is attached once")
    secret = key if isinstance(key, bytes) else read_key_file(os.fspath(key))
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"attach_to_hosts(key=...): expected {SECRET_BYTES} bytes or the path of a key file")
    return attached_hosts().attach(addresses, secret, name=name, timeout_s=timeout, gateway=gateway)


def attached_hosts() -> AttachedHosts:
    """The hosts of this controller.

    Raises:
        RuntimeError: This process is not the controller.
    """
    local = local_proc()
    if local.proc_id != CONTROLLER:
        raise RuntimeError(
            f"hosts are attached by the controller, the process that runs the script; this is {local.proc_id}"
        )
    if local.hosts is None:
        local.hosts = AttachedHosts(local)
    return local.hosts
