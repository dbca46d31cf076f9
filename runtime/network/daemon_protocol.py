"""What callers may ask of a daemon (``danaus host``): requests are checked here before anything acts upon them.

Pure: bytes in, requests out. A message is one frame, a msgpack list ``[kind, n, fields?]``; answers repeat the ``n``.

    ["info", n]              ["info", n, {versions, host, address}]
    ["attach", n, fields]    ["attached", n, {endpoint, pid, host, versions}] or ["refused", n, {reason}]
    ["detach", n, {job}]     ["detached", n, {}]      once the job's agents on this host have ended
    ["shutdown", n]          ["ended", n, {}]         and then the daemon ends
    ["ping", n]              ["pong", n]
    unasked: ["exited", {job, slot, incarnation, code}]   to who attached last; code is negative for a signal
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgpack

from .keys import SECRET_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_REQUEST_BYTES: Final = 64 * 1024
MAX_PEM_BYTES: Final = 16 * 1024
MAX_SLOT: Final = (1 << 16) - 1
MAX_INCARNATION: Final = (1 << 31) - 1
_MAX_NUMBER: Final = (1 << 63) - 1
_MAX_ENV: Final = 64

_JOB: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", re.ASCII)
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)


class Garbage(ValueError):  # noqa: N818  what it is
    """A frame is no request at all, not even one that could be refused."""


class Refusal(ValueError):  # noqa: N818  what it is
    """A request is malformed; its caller is told the reason, which shows no secret."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(number, reason)
        self.number, self.reason = number, reason


@dataclass(frozen=True, slots=True)
class Simple:
    """``info``, ``shutdown`` or ``ping``."""

    kind: str
    number: int


@dataclass(frozen=True, slots=True)
class Detach:
    """End a job's agents on this host."""

    number: int
    job: str


@dataclass(frozen=True, slots=True)
class Attach:
    """Start a job's agent.

    Attributes:
        number: The request's.
        job: Name of the job.
        slot: The host's number in the job.
        incarnation: How many agents this slot has had before.
        secret: Of the job: who knows it may connect to the agent.
        certificate: PEM with its key, for direct streams between processes.
        log_directory: Where the agent's ranks log to; empty for the default.
        env: Variables for the agent and everything below it.
    """

    number: int
    job: str
    slot: int
    incarnation: int
    secret: bytes = field(repr=False)
    certificate: bytes = field(repr=False, default=b"")
    log_directory: str = ""
    env: dict[str, str] = field(repr=False, default_factory=dict)


Request: TypeAlias = Simple | Detach | Attach


def parse(frame: bytes) -> Request:
    """Read one request.

    Raises:
        Garbage: It is none.
        Refusal: It is one, with fields that it may not have.
    """
    if len(frame) > MAX_REQUEST_BYTES:
        raise Garbage(f"{len(frame)} bytes")
    try:
        message = msgpack.unpackb(frame, strict_map_key=True, max_array_len=64, max_map_len=128, max_ext_len=0)
    except (msgpack.UnpackException, ValueError, TypeError):
        raise Garbage("no msgpack") from None
    if type(message) is not list or not 2 <= len(message) <= 3 or not _is_number(message[1], _MAX_NUMBER):
        raise Garbage("no [kind, n, fields?]")
    kind, number = message[0], message[1]
    if type(kind) is not str or kind not in {"info", "shutdown", "ping", "attach", "detach"}:
        raise Refusal(number, "no such request: info, attach, detach, ping and shutdown are known")
    if kind not in {"attach", "detach"}:
        if len(message) != 2:
            raise Refusal(number, f"{kind} takes no fields")
        return Simple(kind, number)
    fields = message[2] if len(message) == 3 else None
    if type(fields) is not dict:
        raise Refusal(number, f"{kind} takes a map of fields")
    return _read_attach(number, fields) if kind == "attach" else _read_detach(number, fields)


def _read_detach(number: int, fields: dict[Any, Any]) -> Detach:
    _check_fields(number, fields, _DETACH, frozenset({"job"}))
    return Detach(number, fields["job"])


def _read_attach(number: int, fields: dict[Any, Any]) -> Attach:
    _check_fields(number, fields, _ATTACH, _ATTACH_NEEDS)
    return Attach(number, **fields)


def _check_fields(number: int, fields: dict[Any, Any], known: _Known, needed: frozenset[str]) -> None:
    missing = sorted(needed - fields.keys())
    if missing:
        raise Refusal(number, f"missing: {', '.join(missing)}")
    for name, value in fields.items():
        rule = known.get(name) if type(name) is str else None
        if rule is None:
            raise Refusal(number, f"unknown field; known are {', '.join(known)}")
        expected, is_right = rule
        if not is_right(value):
            # Not shown: it may be a secret in the wrong place.
            raise Refusal(number, f"{name}: expected {expected}")


def _is_number(value: object, most: int, least: int = 0) -> bool:
    return type(value) is int and least <= value <= most


def _is_job(value: object) -> bool:
    return type(value) is str and _JOB.fullmatch(value) is not None


def _is_pem(value: object) -> bool:
    return type(value) is bytes and len(value) <= MAX_PEM_BYTES


def _is_directory(value: object) -> bool:
    return type(value) is str and len(value) <= 1024 and value.isprintable() and (not value or value.startswith("/"))


def _is_env(value: object) -> bool:
    if type(value) is not dict or len(value) > _MAX_ENV:
        return False
    return all(
        type(name) is str and _VARIABLE.fullmatch(name) and type(text) is str and len(text) <= 4096 and "\0" not in text
        for name, text in value.items()
    )


_Known: TypeAlias = "dict[str, tuple[str, Callable[[object], bool]]]"

_JOB_RULE: Final = ("up to 64 letters, digits, '.', '_', '@' or '-'", _is_job)
_DETACH: Final[_Known] = {"job": _JOB_RULE}
_ATTACH: Final[_Known] = {
    "job": _JOB_RULE,
    "slot": (f"a whole number from 1 to {MAX_SLOT}", lambda value: _is_number(value, MAX_SLOT, 1)),
    "incarnation": ("a whole number, 0 or more", lambda value: _is_number(value, MAX_INCARNATION)),
    "secret": (f"{SECRET_BYTES} bytes", lambda value: type(value) is bytes and len(value) == SECRET_BYTES),
    "certificate": (f"up to {MAX_PEM_BYTES} bytes of PEM", _is_pem),
    "log_directory": ("an absolute path, or nothing", _is_directory),
    "env": (f"up to {_MAX_ENV} variables, name to text", _is_env),
}
_ATTACH_NEEDS: Final = frozenset({"job", "slot", "incarnation", "secret"})
