"""What a job is asked for, and what is known of it: plain data."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

if TYPE_CHECKING:
    from .state import Record

Status = Literal["pending", "running", "ended"]

POLICIES: Final = frozenset({"replace_lost"})
"""Fields in which two scripts that use one job may differ."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")


@dataclass(frozen=True, slots=True)
class HostRecord:
    """One host of a job, as its scheduler and its daemon's ready line tell."""

    index: int
    """Its place along the dimension ``hosts``."""
    name: str
    """What people call it: a machine's name, with the scheduler's id where there is one."""
    address: str
    """Where its daemon listens, as ``tcp://10.0.0.5:4711``; empty until it does."""
    status: Status
    """``pending`` until it listens."""
    detail: str = ""
    """Why it is pending or has ended, with the last lines that it wrote."""

    def __str__(self) -> str:
        return f"host {self.index} ({self.name}, {self.status}{f': {self.detail}' if self.detail else ''})"


@dataclass(frozen=True, slots=True)
class JobState:
    """A job at one moment."""

    name: str
    kind: str
    status: Status
    """``ended`` once no host is left or none was started, ``pending`` while any host is still to come."""
    hosts: tuple[HostRecord, ...]
    detail: str = ""
    """What the scheduler says of it."""


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What is asked for; each kind of job adds its own fields, which JSON can carry."""

    kind: ClassVar[str]
    """Key of the kind in :data:`.kinds.KINDS`."""

    name: str = ""
    """By which other scripts find the job; the kind by default."""
    replace_lost: int = 0
    """How many lost hosts are replaced, in the whole life of the job, for the scripts that attached to them."""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.kind)
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"a {self.kind} job's name={self.name!r}: expected up to 48 letters, digits and . _ -")
        if not isinstance(self.replace_lost, int) or self.replace_lost < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"a {self.kind} job's replace_lost={self.replace_lost!r}: expected a number of hosts, 0 or more"
            )

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON gives them back: tuples are lists."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def differences(record: Record, spec: JobSpec) -> tuple[str, ...]:
    """Return one line per field in which a job of ``spec`` is not the one that ``record`` is of."""
    if record.kind != spec.kind:
        return (f"it is of kind {record.kind!r}, not {spec.kind!r}",)
    runs, asked = record.spec, spec.as_json()
    return tuple(
        f"{name}: {runs.get(name)!r} runs, {asked.get(name)!r} is asked for"
        for name in {**runs, **asked}
        if name not in POLICIES and runs.get(name) != asked.get(name)
    )


def status_of(hosts: list[HostRecord]) -> Status:
    """Return what the job is, if its hosts are these."""
    found = {host.status for host in hosts}
    if found <= {"ended"}:
        return "ended"
    return "pending" if "pending" in found else "running"
