"""What a host's daemon tells the agent that it starts for a job: on standard input, never on a command line."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import msgpack


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """A job agent's place in its job.

    Attributes:
        job: Name of the job.
        slot: Of this host in the job; 1 or more.
        incarnation: How many agents of the job have had that slot before.
        secret: The job's, from which all its agents make their keys.
        certificate: The job's certificate and its key, as PEM, for direct streams between processes.
        listen: Host that the agent listens at.
        advertise: Host by which others reach it.
        host: Name of this host.
        log_root: Where the job's log directory is made; empty for the default.
        daemon_pid: The process whose end is this one's.
    """

    job: str
    slot: int
    incarnation: int
    secret: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    listen: str
    advertise: str
    host: str
    log_root: str
    daemon_pid: int


def read_settings() -> AgentSettings:
    """Read them from standard input, up to its end.

    Raises:
        ValueError: They are not what :class:`AgentSettings` names.
    """
    fields: Any = msgpack.unpackb(sys.stdin.buffer.read())
    known = {name: fields[name] for name in AgentSettings.__slots__ if name in fields}
    missing = [name for name in AgentSettings.__slots__ if name not in known]
    if missing:
        raise ValueError(f"the settings of a job's agent lack {', '.join(missing)}; is the daemon of another version?")
    return AgentSettings(**known)
