"""Hosts that SSH reaches: their daemons are started, looked at and ended by the system's ``ssh``.

The key travels through ssh's input, never on a command line. The daemons outlive the connections and the script; they
end with :meth:`~SSHJob.kill`.
"""

from __future__ import annotations

import json
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from .errors import Attempt, LaunchError
from .far_host import MARK
from .job import Job
from .launch import Output, run_tool
from .spec import HostRecord, JobSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .state import Record

    T = TypeVar("T")

FAR_MODULE: Final = "danaus.runtime.jobs.far_host"
START_LIMIT_S: Final = 75.0
LOOK_LIMIT_S: Final = 30.0
END_LIMIT_S: Final = 45.0
FRESH_S: Final = 2.0
"""A daemon that this script saw start so recently is not looked at again before it is attached to."""
MAX_AT_ONCE: Final = 32
_SSH_FAILED: Final = 255
_NOT_FOUND: Final = 127


@dataclass(frozen=True, kw_only=True)
class SSHSpec(JobSpec):
    """What an :class:`SSHJob` starts, and how it gets there."""

    kind: ClassVar[str] = "ssh"

    hosts: tuple[str, ...]
    """Names as ssh takes them: ``node1``, ``user@node1``, ``ssh://user@node1:2222``, or one of its configuration."""
    spares: tuple[str, ...] = ()
    """Further hosts, for the place of a lost one that cannot be reached any more."""
    user: str = ""
    """Login name on hosts that name none; ssh's choice by default."""
    port: int = 0
    """Port of their sshd; ssh's choice by default."""
    python: str = "python3"
    """The interpreter there, of an environment that has danaus."""
    identity: str = ""
    """Private key file for ssh; ssh's choice by default."""
    options: tuple[str, ...] = ()
    """Settings of ssh, as ``ProxyJump=gateway`` or ``StrictHostKeyChecking=accept-new``."""
    addresses: tuple[str, ...] = ()
    """Where the daemons listen, one per host and spare; by default each where ssh has reached it."""
    listen_port: int = 0
    """Port of the daemons, for firewalls; by default any that is free."""
    connect_timeout_s: int = 15
    """How long ssh tries to connect."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hosts", "spares", "options", "addresses"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise TypeError(f"SSHJob({name}={value!r}): expected a list of texts, as {name}=[{value!r}]")
            object.__setattr__(self, name, tuple(value))
        if not self.hosts:
            raise ValueError("SSHJob(hosts=[]): expected one host at least")
        for host in (*self.hosts, *self.spares):
            if not host or host.startswith("-") or any(character.isspace() for character in host):
                raise ValueError(f"SSHJob: {host!r} is no name of a host as ssh takes it")
        for option in self.options:
            if "=" not in option:
                raise ValueError(f"SSHJob(options=...): {option!r} is no setting of ssh, as ProxyJump=gateway")
        expected = len(self.hosts) + len(self.spares)
        if self.addresses and len(self.addresses) != expected:
            raise ValueError(
                f"SSHJob(addresses=...): {len(self.addresses)} for {expected} hosts and spares: "
                "give one for each, or none"
            )


class SSHJob(Job[SSHSpec]):
    """Hosts that SSH reaches, without a password (``ssh HOST true`` must work in a script).

    The daemons listen where ssh has reached their hosts, and outlive this script: ``kill`` ends them, here or in
    another script, as leaving ``with`` does.

    Args:
        hosts: Names as ssh takes them, ``user@node1`` or ``ssh://user@node1:2222`` too.
        spares: Further hosts, for the place of a lost one that cannot be reached any more.
        user: Login name on hosts that name none.
        port: Port of their sshd.
        python: The interpreter there, of an environment that has danaus.
        identity: Private key file for ssh.
        options: Settings of ssh, as ``ProxyJump=gateway``.
        addresses: Where the daemons listen, one per host and spare; by default each where ssh has reached it.
        listen_port: Port of the daemons; by default any that is free.
        connect_timeout_s: How long ssh tries to connect.
        name: By which other scripts find the job.
        replace_lost: How many lost hosts are replaced: on the same machine if ssh still reaches it, else on a spare.
    """

    default_timeout_s: ClassVar[float] = 90.0

    def __init__(
        self,
        *,
        hosts: Sequence[str],
        spares: Sequence[str] = (),
        user: str = "",
        port: int = 0,
        python: str = "python3",
        identity: str = "",
        options: Sequence[str] = (),
        addresses: Sequence[str] = (),
        listen_port: int = 0,
        connect_timeout_s: int = 15,
        name: str = "",
        replace_lost: int = 0,
    ) -> None:
        spec = SSHSpec(
            name=name,
            replace_lost=replace_lost,
            hosts=hosts,  # type: ignore[arg-type]
            spares=spares,  # type: ignore[arg-type]
            user=user,
            port=port,
            python=python,
            identity=identity,
            options=options,  # type: ignore[arg-type]
            addresses=addresses,  # type: ignore[arg-type]
            listen_port=listen_port,
            connect_timeout_s=connect_timeout_s,
        )
        super().__init__(spec)
        self._started_s: dict[str, float] = {}

    def render(self) -> str:
        lines = [shlex.join(self._start_command(index, index)) for index in range(len(self.spec.hosts))]
        return "\n".join(f"{line} < KEY_FILE" for line in lines) + "\n"

    def logs(self, host: int, *, lines: int = 200) -> str:
        notes = self._record().launched["hosts"][host]
        done = self._far(notes, "logs", LOOK_LIMIT_S, "--lines", str(lines))
        return str(self._answer(notes["host"], done)["lines"])

    def _launch(self, directory: Path, key_file: Path) -> dict[str, Any]:  # noqa: ARG002  hosts cannot see it
        key = key_file.read_bytes()
        places = list(range(len(self.spec.hosts)))
        done = _side_by_side(lambda place: self._start_host(place, place, key), places)
        failed = [item for item in done if isinstance(item, Attempt)]
        if failed:
            self._stop([item for item in done if not isinstance(item, Attempt)])
            raise self._failure(failed)
        return {"hosts": done, "spares_used": 0}

    def _observe(self, record: Record) -> tuple[list[HostRecord], str]:
        places = list(enumerate(record.launched["hosts"]))
        return _side_by_side(lambda place: self._observe_host(*place), places), ""

    def _replace(self, record: Record, index: int) -> dict[str, Any]:
        """Start again on the same machine, else on a spare."""
        hosts, used = list(record.launched["hosts"]), int(record.launched["spares_used"])
        self._stop([hosts[index]])
        key = Path(record.key_file).read_bytes()
        first_spare = len(self.spec.hosts)
        failed: list[Attempt] = []
        for place in [hosts[index]["place"], *range(first_spare + used, first_spare + len(self.spec.spares))]:
            started = self._start_host(index, place, key)
            if place >= first_spare:
                used = place - first_spare + 1
            if not isinstance(started, Attempt):
                hosts[index] = started
                return {"hosts": hosts, "spares_used": used}
            failed.append(started)
        raise self._failure(failed)

    def _end(self, record: Record) -> None:
        failed = [item for item in self._stop(record.launched["hosts"]) if item is not None]
        if failed:
            advice = (
                f"the others have ended; repeat `danaus job kill {self.name}` once these can be reached, or forget the "
                f"job: rm {self._file.path}"
            )
            raise LaunchError(self.name, tuple(failed), advice)

    def _machine(self, place: int) -> str:
        return (*self.spec.hosts, *self.spec.spares)[place]

    def _ssh(self, host: str, arguments: Sequence[str]) -> list[str]:
        spec = self.spec
        command = ["ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={spec.connect_timeout_s}"]
        command += ["-p", str(spec.port)] if spec.port else []
        command += ["-l", spec.user] if spec.user and "@" not in host else []
        command += ["-i", spec.identity, "-o", "IdentitiesOnly=yes"] if spec.identity else []
        for option in spec.options:
            command += ["-o", option]
        return [*command, "--", host, shlex.join([spec.python, "-m", FAR_MODULE, *arguments])]

    def _start_command(self, index: int, place: int) -> list[str]:
        arguments = ["start", "--name", f"{self.name}-{index}"]
        arguments += ["--address", self.spec.addresses[place]] if self.spec.addresses else []
        arguments += ["--port", str(self.spec.listen_port)] if self.spec.listen_port else []
        return self._ssh(self._machine(place), arguments)

    def _start_host(self, index: int, place: int, key: bytes) -> dict[str, Any] | Attempt:
        host = self._machine(place)
        done = run_tool(self._start_command(index, place), timeout_s=START_LIMIT_S, stdin=key)
        answer = _parse(done)
        if answer is None:
            return done.attempt(f"host {index} ({host})")
        self._started_s[answer["directory"]] = time.monotonic()
        return {**answer, "host": host, "place": place}

    def _far(self, notes: dict[str, Any], action: str, timeout_s: float, *more: str) -> Output:
        known = ["--pid", str(notes["pid"]), "--start-ticks", str(notes["start_ticks"])]
        arguments = [action, "--directory", notes["directory"], *known, *more]
        return run_tool(self._ssh(notes["host"], arguments), timeout_s=timeout_s)

    def _answer(self, host: str, done: Output) -> dict[str, Any]:
        answer = _parse(done)
        if answer is None:
            raise self._failure([done.attempt(host)])
        return answer

    def _observe_host(self, index: int, notes: dict[str, Any]) -> HostRecord:
        name, address = notes["host"], notes["address"]
        if time.monotonic() - self._started_s.get(notes["directory"], -FRESH_S) < FRESH_S:
            return HostRecord(index, name, address, "running")
        done = self._far(notes, "look", LOOK_LIMIT_S)
        answer = _parse(done)
        if answer is None:
            return HostRecord(index, name, address, "ended", f"ssh does not reach it: {done.err.strip()}")
        if answer["alive"]:
            return HostRecord(index, name, address, "running")
        return HostRecord(index, name, address, "ended", f"it ended\n{answer['lines']}".strip())

    def _stop(self, hosts: list[dict[str, Any]]) -> list[Attempt | None]:
        def stop(notes: dict[str, Any]) -> Attempt | None:
            done = self._far(notes, "stop", END_LIMIT_S)
            return None if _parse(done) is not None else done.attempt(notes["host"])

        return _side_by_side(stop, hosts)

    def _failure(self, failed: list[Attempt]) -> LaunchError:
        return LaunchError(self.name, tuple(failed), _advice(failed[0], self.spec.python))


def _parse(done: Output) -> dict[str, Any] | None:
    """Return what the far side answered, None if it failed."""
    lines = [line for line in done.out.splitlines() if line.startswith(MARK)]
    return json.loads(lines[-1].removeprefix(MARK)) if done.code == 0 and lines else None


def _side_by_side(work: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    if not items:
        return []
    with ThreadPoolExecutor(min(MAX_AT_ONCE, len(items)), thread_name_prefix="danaus-ssh") as pool:
        return list(pool.map(work, items))


def _advice(attempt: Attempt, python: str) -> str:
    if "No module named" in attempt.output or attempt.code == _NOT_FOUND:
        return (
            f"python={python!r} is not a Python there that has this danaus: give the path of one, as "
            "python='/home/me/venv/bin/python'"
        )
    if attempt.code == _SSH_FAILED:
        return "ssh must work here without a password: try the command with -v; see user=, port=, identity=, options="
    return ""
