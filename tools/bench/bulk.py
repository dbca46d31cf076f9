"""Bulk transfers: remote buffers on one host and over TLS, large arguments between hosts.

The limits are a copy between warm memory, and a plain TLS 1.3 connection of Python's between two processes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import TYPE_CHECKING, Any, Final

from . import limits, payload
from .lab import MIB, Lab, Measure, in_turns, times
from .rows import Goal, Row
from .subject import WAIT_S, AbsentError

if TYPE_CHECKING:
    from collections.abc import Generator

_GIB: Final = 1 << 30
_LARGE: Final = 64 * MIB
_OF_MEMCPY: Final = Goal(times=1 / 0.7)
_OF_TLS: Final = Goal(times=1 / 0.8)


def _on_one_host(size_bytes: int, text: str) -> Measure:
    row = Row(
        name=f"buffer-read-{text}".replace(" ", "-"),
        title=f"RemoteBuffer.read_into, {text}, one host",
        unit="ms",
        limit_name="memcpy",
        anchor=4.5 if size_bytes == _LARGE else None,
        goal=_OF_MEMCPY,
    )

    def run(lab: Lab) -> None:
        lab.say(row.title)
        count = 5 if size_bytes <= _LARGE else 1
        with _keepers(lab) as keepers:
            buffer = keepers.register.call_one(size_bytes).get(timeout=WAIT_S)
            own = bytearray(b"\2") * size_bytes
            samples, copies, foreign = in_turns(
                min(lab.effort.rounds, 5),
                lambda: times(lambda: buffer.read_into(own).get(timeout=WAIT_S), count),
                lambda: limits.copy_times(size_bytes, count + 1)[1:],
                lambda: limits.foreign_read_times(size_bytes, count + 1)[1:] if lab.effort.thorough else [],
            )
            _check(own[0], own[-1])
            keepers.drop.call_one().get(timeout=WAIT_S)
        lab.record(row, samples, limit=copies, beside={"process_vm_readv": foreign} if foreign else {})

    return Measure(name=row.name, rows=(row,), run=run)


def _over_tls() -> Measure:
    rows = {
        way: Row(
            name=f"buffer-{way}-tls",
            title=f"RemoteBuffer.{title}, 64 MiB, TLS over loopback",
            unit="ms",
            limit_name="plain TLS socket",
            goal=_OF_TLS,
        )
        for way, title in {"read": "read_into", "write": "write_from"}.items()
    }

    def run(lab: Lab) -> None:
        from ...runtime.bulk import certificate
        from ...runtime.context import local_proc
        from .tls_limit import PlainTls

        lab.say(rows["read"].title)
        with _keepers(lab) as keepers:
            directory = local_proc().job_directory()
            if not certificate.exists(directory):
                certificate.write(directory, certificate.mint())
            buffer = keepers.register.call_one(_LARGE).get(timeout=WAIT_S).via("tls")
            own = bytearray(b"\2") * _LARGE
            plain = PlainTls(os.path.join(directory, certificate.FILE), _LARGE)
            with limits.closing_all(plain):
                reads, writes, limit = in_turns(
                    lab.effort.rounds,
                    lambda: times(lambda: buffer.read_into(own).get(timeout=WAIT_S), 2),
                    lambda: times(lambda: buffer.write_from(own).get(timeout=WAIT_S), 2),
                    lambda: plain.times(2),
                )
            _check(own[0], own[-1])
            keepers.drop.call_one().get(timeout=WAIT_S)
        lab.record(rows["read"], reads, limit=limit)
        lab.record(rows["write"], writes, limit=limit)

    return Measure(name="buffer-tls", rows=tuple(rows.values()), run=run)


def _argument_between_hosts() -> Measure:
    row = Row(
        name="argument-between-hosts",
        title="64 MiB numpy argument to another host (loopback)",
        unit="ms",
        limit_name="plain TLS socket",
        goal=_OF_TLS,
    )

    def run(lab: Lab) -> None:
        _only_danaus(lab)
        from ...runtime.bulk import certificate
        from ...runtime.jobs import LocalJob
        from .bulk_actors import Keeper
        from .tls_limit import PlainTls

        lab.say(row.title)
        array = payload.make("numpy", _LARGE)
        with LocalJob(hosts=1) as job, tempfile.TemporaryDirectory() as directory:
            certificate.write(directory, certificate.mint())
            keepers: Any = job.hosts(timeout=WAIT_S).spawn_procs({"p": 1}).spawn("keepers", Keeper)
            plain = PlainTls(os.path.join(directory, certificate.FILE), _LARGE)
            with limits.closing_all(plain):
                samples, limit = in_turns(
                    lab.effort.rounds,
                    lambda: times(lambda: _check(*keepers.ends.call_one(array).get(timeout=WAIT_S)), 2),
                    lambda: plain.times(2),
                )
        lab.record(row, samples, limit=limit)

    return Measure(name=row.name, rows=(row,), run=run)


@contextlib.contextmanager
def _keepers(lab: Lab) -> Generator[Any]:
    """One actor that holds memory, in a process of its own."""
    _only_danaus(lab)
    from ...runtime import this_host
    from .bulk_actors import Keeper

    procs = this_host().spawn_procs({"p": 1}, name="bench")
    try:
        yield procs.spawn("keepers", Keeper)
    finally:
        procs.stop().get(timeout=WAIT_S)


def _only_danaus(lab: Lab) -> None:
    if lab.subject.package != "danaus":
        raise AbsentError("it has no remote buffers that this benchmark knows")


def _check(first: int, last: int) -> None:
    if (first, last) != (1, 1):
        raise RuntimeError(f"the ends of what was moved are {first} and {last}, expected 1 and 1")


MEASURES: Final = (
    _on_one_host(_LARGE, "64 MiB"),
    _on_one_host(_GIB, "1 GiB"),
    _over_tls(),
    _argument_between_hosts(),
)
