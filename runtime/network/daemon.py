"""The daemon of a host (``danaus host``): starts an agent for each job that attaches, and outlives them all.

One thread, one poll loop. It loads no pickle, routes nothing and keeps no state but its table (daemon_jobs.py), so that
it can run for months. Who holds the host's key may ask it for anything; see daemon_protocol.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import select
import signal
import time
from typing import TYPE_CHECKING, Any, Final, Self

import msgpack
import zmq

from ..config import preempt_s
from ..host.kernel import adopt_orphans
from .attempts import Attempts
from .daemon_jobs import Asker, JobTable, Send, Signal
from .daemon_protocol import MAX_REQUEST_BYTES, Attach, Detach, Garbage, Refusal, Request, parse
from .door import Door, listen
from .endpoints import EVERYWHERE, endpoint_of, split_address
from .job_process import start_agent
from .job_processes import JobProcesses
from .keys import derive
from .turned_away import Counts, TurnedAway

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from .daemon_jobs import Command
    from .job_process import StartChild

_log = logging.getLogger("danaus.daemon")

_BATCH: Final = 64
_LINGER_MS: Final = 500
_pack = msgpack.Packer(autoreset=True).pack


class Daemon:
    """The daemon's state and its loop; bound when it is made. Use it in a ``with`` block.

    Args:
        address: Where to listen, ``tcp://HOST:PORT``.
        secret: Of the key file: who holds the same may attach.
        name: Of this host.
        versions: Of Python, danaus and what else has to be equal on all hosts.
        advertise: Host by which others reach this one; by default the one it listens at.
        start: Starts an agent's process.

    Attributes:
        endpoint: Where others reach it.
        num_garbage: Messages dropped because they were no requests.
        num_refused: Callers turned away because they do not have the key.
        num_failed: Connections that came to nothing, these among them.
        ended_by: The signal that ended it, None where a caller did, or the end of who it follows.
    """

    def __init__(
        self,
        address: str,
        secret: bytes,
        *,
        name: str,
        versions: Mapping[str, str],
        advertise: str | None = None,
        start: StartChild = start_agent,
    ) -> None:
        self._name, self._versions = name, dict(versions)
        self._table = JobTable({"host": name, "versions": self._versions}, drain_s=preempt_s())
        self._is_process = self._is_ending = False
        self.ended_by: int | None = None
        self._followed: list[int] = []
        self.num_garbage = 0
        self._turned_away = TurnedAway()
        host, _ = split_address(address)
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self._door = Door(self._context, [derive(secret, "caller", "host").public])
            self._listener = listen(
                self._context,
                zmq.ROUTER,
                address,
                derive(secret, "listener", "host"),
                self._door,
                max_message_bytes=MAX_REQUEST_BYTES,
                # A caller that comes back under its old name is the same one: all have the key.
                options={zmq.ROUTER_HANDOVER: 1},
            )
            self._attempts = Attempts(self._listener)
        except BaseException:
            self._context.destroy(0)
            raise
        self._listen_host = split_address(endpoint_of(self._listener))[0]
        self._advertise = advertise or (self._listen_host if host not in EVERYWHERE else os.uname().nodename)
        self.endpoint = endpoint_of(self._listener, self._advertise)
        self._processes = JobProcesses(
            self._table,
            start,
            self._settings,
            carry_out=self._carry_out,
            watch=self._watch,
            unwatch=self._unwatch,
        )
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], object]] = {}
        self._signals, self._signal_to = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._watch(self._signals, self._on_signals)

    @property
    def num_refused(self) -> int:
        return self._door.refused

    @property
    def num_failed(self) -> int:
        return self._attempts.num_failed

    # the loop:

    def run(self) -> None:
        """Serve until it is told to end, and its agents have ended."""
        poller = zmq.Poller()
        for source in (self._listener, self._door.socket, self._attempts.socket, self._epoll.fileno()):
            poller.register(source, zmq.POLLIN)
        while not self._table.is_over:
            ready = dict(poller.poll(self._timeout_ms()))
            if self._epoll.fileno() in ready:
                for fd, _ in self._epoll.poll(0):
                    handler = self._handlers.get(fd)
                    if handler is not None:
                        handler()
            if self._door.socket in ready:
                self._door.serve()
            if self._attempts.socket in ready:
                self._attempts.serve()
            if self._listener in ready:
                self._receive()
            self._carry_out(self._table.check(now_s=time.monotonic()))
            self._report()

    def end(self, signum: int) -> None:
        """Have the loop end everything, as by ``signum``; from any thread."""
        # It may have ended already.
        with contextlib.suppress(OSError):
            os.write(self._signal_to, bytes([signum]))

    def take_over_process(self) -> None:
        """Have this process do nothing else: its signals end the daemon, its descendants' orphans are buried.

        SIGTERM lets the jobs drain; SIGINT or a second SIGTERM ends them at once.
        """
        adopt_orphans()
        self._processes.adopt()
        self._is_process = True
        # Strangers' connections take one each, until they have failed to show a key.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        # Not left to a handler in Python: a signal just before the poll would be noticed after it only.
        signal.set_wakeup_fd(self._signal_to, warn_on_full_buffer=False)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(signum, lambda _signum, _frame: None)

    def follow(self, pid: int) -> bool:
        """End at once when the process ``pid`` ends; False where it has ended already."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        self._followed.append(pidfd)
        self._watch(pidfd, lambda: self._on_followed_gone(pidfd))
        return True

    def _on_followed_gone(self, pidfd: int) -> None:
        self._unwatch(pidfd)
        self._end(signal.SIGINT, cause=None)

    def _end(self, signum: int, *, cause: int | None) -> None:
        if not self._is_ending:
            self._is_ending, self.ended_by = True, cause
        self._carry_out(self._table.on_end(signum, now_s=time.monotonic()))

    def _timeout_ms(self) -> int:
        next_s = min(filter(None, (self._table.next_check_s(), self._turned_away.next_check_s())), default=None)
        return -1 if next_s is None else max(0, int((next_s - time.monotonic()) * 1000) + 1)

    def _watch(self, fd: int, handler: Callable[[], object]) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def _unwatch(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _on_signals(self) -> None:
        for signum in os.read(self._signals, 4096):
            if signum == signal.SIGCHLD:
                self._processes.reap_orphans()
                continue
            # Agents end at once on a second SIGTERM.
            _log.warning("ending by %s", signal.Signals(signum).name)
            self._end(signum, cause=signum)

    # requests:

    def _receive(self) -> None:
        for _ in range(_BATCH):
            try:
                frames = self._listener.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if len(frames) != 2:
                    raise Garbage(f"{len(frames)} frames")  # noqa: TRY301  told like any other
                self._on_request(frames[0], parse(frames[-1]))
            except Garbage:
                self.num_garbage += 1
            except Refusal as refusal:
                self._send(frames[0], ["refused", refusal.number, {"reason": refusal.reason}])

    def _on_request(self, caller: bytes, request: Request) -> None:
        now_s = time.monotonic()
        asker = Asker(caller, request.number)
        if isinstance(request, Attach):
            self._carry_out(self._table.on_attach(asker, request, now_s=now_s))
        elif isinstance(request, Detach):
            self._carry_out(self._table.on_detach(asker, request.job, now_s=now_s))
        elif request.kind == "ping":
            self._send(caller, ["pong", request.number])
        elif request.kind == "info":
            fields = {"versions": self._versions, "host": self._name, "address": self.endpoint}
            self._send(caller, ["info", request.number, fields])
        else:
            self._send(caller, ["ended", request.number, {}])
            _log.warning("shut down by a caller")
            self._end(signal.SIGINT, cause=None)

    def _send(self, caller: bytes, message: list[Any]) -> None:
        # To a caller that has gone, or that reads nothing, it is lost.
        self._listener.send_multipart([caller, _pack(message)], zmq.NOBLOCK)

    # agents:

    def _carry_out(self, commands: Iterable[Command]) -> None:
        for command in commands:
            if isinstance(command, Send):
                self._send(command.caller, command.message)
            elif isinstance(command, Signal):
                self._processes.send_signal(command.key, command.signum)
            else:
                self._processes.start(command)

    def _settings(self, attach: Attach) -> dict[str, Any]:
        """What the agent reads on its standard input; see host/settings.py."""
        return {
            "job": attach.job,
            "slot": attach.slot,
            "incarnation": attach.incarnation,
            "secret": attach.secret,
            "certificate": attach.certificate,
            "listen": self._listen_host,
            "advertise": self._advertise,
            "host": self._name,
            "log_root": attach.log_directory,
            "daemon_pid": os.getpid(),
        }

    # words:

    def _report(self) -> None:
        counts = Counts(self.num_garbage, self._door.refused, self._attempts.num_failed)
        if self._turned_away.check(counts, now_s=time.monotonic()):
            _log.warning(
                "so far %d malformed messages dropped, %d callers without the key turned away (last from %s), "
                "%d connections in all that came to nothing",
                counts.garbage,
                counts.refused,
                self._door.last_refused or "nowhere",
                counts.failed,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; agents that are still there are killed."""
        self._processes.close()
        # The last answers may still be on their way.
        self._attempts.close()
        self._listener.close(_LINGER_MS)
        self._door.close()
        self._context.term()
        self._epoll.close()
        if self._is_process:
            signal.set_wakeup_fd(-1)
            # Python would put back what kills, in its last moments, and with it another exit code.
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, signal.SIG_IGN)
        for fd in (self._signals, self._signal_to, *self._followed):
            os.close(fd)
