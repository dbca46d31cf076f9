"""`danaus job exec` and `logs`: attaches to a job's hosts and shows what actors there have to say.

All go through the hosts' daemons, so they work alike for every kind of job and need neither a login nor the scheduler.
"""

from __future__ import annotations

import contextlib
import re
import sys
from typing import TYPE_CHECKING, Any, Final

from .. import Channel, context, shutdown_context
from ..runtime.errors import ActorError, DanausError, SupervisionError
from ..runtime.jobs import JobError
from ..runtime.jobs.remote import MESH, WINDOW, Commands, Logs, Terminal, Text
from ..runtime.network.attach import attach_to_hosts

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from ..runtime.calls.future import Future
    from ..runtime.calls.port import PortReceiver
    from ..runtime.host_mesh import HostMesh
    from ..runtime.jobs import HostRecord, Job

LOST: Final = 255
"""Exit code for a host that was lost, as ssh has it."""
POLL_S: Final = 0.2
"""How often it is seen that nothing more can come from a host."""
_LOG_NAME: Final = re.compile(r"(?P<mesh>.+)-[0-9a-f]{6}(@[^.]*)?\.(?P<rank>\d+)")
"""Of a rank's file, without its suffix."""


@contextlib.contextmanager
def attached(job: Job[Any], chosen: Sequence[int], *, timeout_s: float) -> Generator[tuple[HostMesh, list[HostRecord]]]:
    """Attach to hosts of a running job, and detach at the end; nothing is started or replaced.

    Args:
        job: The job.
        chosen: Numbers of its hosts; none for all that listen.
        timeout_s: How long they may take to answer.

    Raises:
        JobError: The job does not run, or has no such host, or that host does not listen.
    """
    state = job.state()
    known = {host.index: host for host in state.hosts}
    for index in chosen:
        if index not in known:
            raise JobError(f"job {job.name!r} has no host {index}: expected 0 to {len(known) - 1}")
        if known[index].status != "running":
            raise JobError(f"host {index} of job {job.name!r} does not listen: {_why(known[index])}")
    hosts = [known[index] for index in chosen] if chosen else [h for h in state.hosts if h.status == "running"]
    if not hosts:
        raise JobError(
            f"job {job.name!r}: no host listens ({state.status}{f', {state.detail}' if state.detail else ''})"
        )
    context()
    with _losses_reported():
        mesh = attach_to_hosts([host.address for host in hosts], key=job.key_file(), timeout=timeout_s)
        try:
            yield mesh, hosts
        finally:
            mesh.stop()
            shutdown_context()


@contextlib.contextmanager
def _losses_reported() -> Generator[None]:
    """Have a lost host fail what runs there, and not this whole command."""
    package: Any = sys.modules[__name__.partition(".")[0]]
    before = package.unhandled_fault_hook
    package.unhandled_fault_hook = lambda _failure: None
    try:
        yield
    finally:
        package.unhandled_fault_hook = before


def _why(host: HostRecord) -> str:
    return ", ".join(filter(None, [host.status, " ".join(host.detail.split())]))


@contextlib.contextmanager
def actors_on(mesh: HostMesh, actor_class: type[Commands | Terminal | Logs]) -> Generator[Any]:
    """Put an actor on each host; end its process at the end."""
    procs = mesh.spawn_procs(name=MESH, gpus="shared")
    actors = procs.spawn(MESH, actor_class)
    try:
        yield actors
    except BaseException:
        # What runs there would be waited for.
        with contextlib.suppress(DanausError):
            actors.end.broadcast()
        raise
    finally:
        procs.stop().get(timeout=30.0)


def exec_on_hosts(job: Job[Any], chosen: Sequence[int], command: Sequence[str], *, timeout_s: float) -> int:
    """Run a command on hosts, print what it writes, return the highest exit code."""
    with attached(job, chosen, timeout_s=timeout_s) as (mesh, hosts), actors_on(mesh, Commands) as actors:
        port, receiver = Channel[Any].open()
        by_host = {host.index: actor for actor, host in zip(actors, hosts, strict=True)}
        calls = {host: actor.run.call_one(list(command), host, port) for host, actor in by_host.items()}
        # With one host there is nothing to tell apart.
        printer = _Printer(with_host=len(hosts) > 1 or len(chosen) > 1)
        _print_all(receiver, calls, printer, Shown(by_host))
        codes = [_exit_code(calls[host.index], host, printer) for host in hosts]
    missing = [] if chosen else [host for host in job.state().hosts if host.status != "running"]
    for host in missing:
        print(f"danaus job exec: host {host.index} was left out: {_why(host)}", file=sys.stderr)
    return max([*codes, *([1] if missing else [])])


def _print_all(
    receiver: PortReceiver[Any], calls: Mapping[int, Future[Any]], printer: _Printer, shown: Shown | None = None
) -> None:
    """Print what arrives until the call to each host has said all, or has failed.

    Args:
        receiver: Where it arrives.
        calls: By number of the host.
        printer: Prints it.
        shown: Is told of what was printed.
    """
    silent = set(calls)
    while silent:
        waiting = receiver.recv()
        while not waiting.done():
            silent -= {host for host in silent if calls[host].done() and calls[host].exception() is not None}
            if not silent:
                break
            with contextlib.suppress(TimeoutError):
                waiting.exception(timeout=POLL_S)
        else:
            text = waiting.get()
            if not text.source:
                silent.discard(text.host)
                continue
            printer.show(text)
            if shown is not None:
                shown.note(text.host)
    printer.end()


class Shown:
    """Makes room for further pieces where some have been shown."""

    def __init__(self, actors: Mapping[int, Any]) -> None:
        self._actors, self._counts = actors, dict.fromkeys(actors, 0)

    def note(self, host: int) -> None:
        """A piece of ``host`` was shown."""
        self._counts[host] += 1
        if self._counts[host] == WINDOW // 4:
            self._counts[host] = 0
            # A host that is lost is told of by its call.
            with contextlib.suppress(DanausError):
                self._actors[host].more.broadcast(WINDOW // 4)


def _exit_code(call: Future[int], host: HostRecord, printer: _Printer) -> int:
    printer.end(host.index)
    try:
        code = call.get()
    except (SupervisionError, ActorError) as error:
        print(f"danaus job exec: host {host.index} ({host.name}): {first_line(error)}", file=sys.stderr)
        return LOST
    if code:
        print(f"danaus job exec: host {host.index} ({host.name}): exit code {code}", file=sys.stderr)
    return code


def first_line(error: DanausError) -> str:
    """Return what an error says before its details."""
    return str(error).partition("\n")[0]


class _Printer:
    """Prints whole lines, each with where it is from; several hosts never share a line."""

    def __init__(self, *, with_host: bool, with_source: bool = False) -> None:
        self._with_host, self._with_source = with_host, with_source
        self._rest: dict[tuple[int, str], bytes] = {}

    def show(self, text: Text) -> None:
        """Print the lines that are whole."""
        key = text.host, text.source
        *lines, self._rest[key] = (self._rest.get(key, b"") + text.data).split(b"\n")
        self._write(text.host, text.source, lines)

    def end(self, host: int | None = None) -> None:
        """Print what was no whole line, of one host or of all."""
        for key in [key for key in self._rest if host in {None, key[0]}]:
            rest = self._rest.pop(key)
            self._write(*key, [rest] if rest else [])

    def _write(self, host: int, source: str, lines: Sequence[bytes]) -> None:
        rank = _LOG_NAME.fullmatch(source) if self._with_source else None
        words = [rank["mesh"], rank["rank"]] if rank else [str(host)] if self._with_host else []
        prefix = f"[{' '.join(words)}] ".encode() if words else b""
        stream = sys.stderr if source == "err" else sys.stdout
        stream.flush()
        stream.buffer.write(b"".join(prefix + line + b"\n" for line in lines))
        stream.flush()


def show_logs(job: Job[Any], chosen: Sequence[int], *, lines: int, follow: bool, timeout_s: float) -> int:
    """Print the last lines of the ranks of a job's newest run, and go on with what they write if asked to."""
    with attached(job, chosen, timeout_s=timeout_s) as (mesh, hosts), actors_on(mesh, Logs) as actors:
        port, receiver = Channel[Any].open()
        printer = _Printer(with_host=True, with_source=True)
        calls = {
            host.index: actor.read.call_one(host.index, name, lines, follow, port)
            for actor, host, name in zip(actors, hosts, mesh.names, strict=True)
        }
        _print_all(receiver, calls, printer)
        folders = [call.get() for call in calls.values() if call.exception() is None]
    if not any(folders):
        print(f"danaus job logs: no rank of job {job.name!r} has written anything yet", file=sys.stderr)
    return 0 if len(folders) == len(hosts) else LOST


def show_daemon_logs(job: Job[Any], chosen: Sequence[int], *, lines: int) -> int:
    """Print the last lines that the daemons of hosts wrote, by the scheduler's own means."""
    printer = _Printer(with_host=True)
    for index in chosen or [host.index for host in job.state().hosts]:
        text = job.logs(index, lines=lines)
        printer.show(Text(index, "out", text.encode() + b"\n" if text else b""))
    return 0
