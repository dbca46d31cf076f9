"""The host agent: the one daemon on a host that starts processes, watches them and tells who waits for them.

It never unpickles and runs no user code. The controller starts it in a Python of its own (see interpreter.py).

    controller --REQUEST--> agent --fork request--> zygote --fork--> procs (children of the agent)
    agent --EVENT--> controller and procs: up, died, log, stop
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import select
import shutil
import signal
import socket
import time
from typing import TYPE_CHECKING, Any, Final

import zmq

from ..config import GRACE_AFTER_ERROR_S
from ..failure import FailureKind, pack_failure
from ..messages import wire
from ..messages.link import MULTIPART, Link
from ..proc import AGENT
from .devices import DeviceLeases, device_env, read_gpus, usable_devices
from .kernel import adopt_orphans
from .log_files import LogFiles
from .logs import LineSplitter, Tail
from .proc_table import AskStop, Command, ProcTable, TellGone, TellUp
from .zygotes import Zygotes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_READ_BYTES: Final = 1 << 16
_log = logging.getLogger("danaus.agent")


class _Output:
    """One proc's stdout or stderr."""

    def __init__(self, proc: str, stream: str, fd: int, tail: Tail) -> None:
        self.proc, self.stream, self.fd, self.tail = proc, stream, fd, tail
        self.splitter = LineSplitter()


class Agent:
    """The daemon's state and its loop.

    Args:
        directory: The job's private socket directory.
        controller: Address of the controller.
        controller_pid: Process whose end is the job's end.
        host: Name of this host.
        log_directory: Where per-rank files go.
        seed: Socket of the first zygote, forked before this process had anything to hand on.
    """

    def __init__(
        self, directory: str, controller: str, controller_pid: int, host: str, log_directory: str, seed: socket.socket
    ) -> None:
        self._directory, self._controller, self._host = directory, controller, host
        self._table = ProcTable(host)
        self._logs = LogFiles(log_directory)
        self._context: zmq.Context[Any] = zmq.Context()
        self._pull: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._pull.rcvhwm = 0
        self._pull.bind(f"ipc://{directory}/{AGENT}")
        self._links: dict[str, Link] = {}
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], object]] = {}
        self._outputs: dict[str, list[_Output]] = {}
        self._pidfds: dict[str, int] = {}
        self._leases: DeviceLeases | None = None
        self._quitting = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._zygotes = Zygotes(
            seed,
            watch=self._watch,
            unwatch=self._unwatch,
            on_started=self._on_started,
            started=self._started_pids,
            on_failed=self._on_not_started,
            warn=self._warn,
        )
        self._watch(self._wake_fd, lambda: os.eventfd_read(self._wake_fd))
        controller_fd = os.pidfd_open(controller_pid)
        self._watch(controller_fd, self._on_controller_gone)
        self._controller_fd = controller_fd
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda *_: self._quit())
        self._link(controller, f"{directory}/{controller}")
        self._tell(controller, "agent_up", {"path": f"{directory}/{AGENT}", "pid": os.getpid(), "logs": log_directory})

    # the loop:

    def run(self) -> None:
        """Serve until the job ends; leaves nothing behind."""
        poller = zmq.Poller()
        poller.register(self._pull, zmq.POLLIN)
        poller.register(self._epoll, zmq.POLLIN)
        while not (self._quitting and not self._table.procs):
            ready = dict(poller.poll(self._timeout_ms()))
            if self._epoll.fileno() in ready or self._epoll in ready:
                for fd, _ in self._epoll.poll(0):
                    handler = self._handlers.get(fd)
                    if handler is not None:
                        handler()
            if self._pull in ready:
                self._receive()
            self._carry_out(self._table.check(now_s=time.monotonic()))
        self._close()

    def _timeout_ms(self) -> int:
        next_s = self._table.next_check_s()
        return -1 if next_s is None else max(0, int((next_s - time.monotonic()) * 1000) + 1)

    def _receive(self) -> None:
        for _ in range(256):
            try:
                frame = self._pull.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if frame[:1] == MULTIPART:
                    while self._pull.rcvmore:
                        self._pull.recv()
                    raise wire.WireError("agents take no attachments")  # noqa: TRY301  told like any other
                for envelope in wire.unpack([frame]):
                    self._on_request(envelope)
            except wire.WireError as error:
                _log.warning("dropped a malformed message: %s", error)

    def _watch(self, fd: int, handler: Callable[[], object]) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def _unwatch(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    # requests:

    def _on_request(self, envelope: wire.Envelope) -> None:
        if envelope[0] != wire.REQUEST:
            raise wire.WireError(f"agents take requests, not kind {envelope[0]}")
        _, name, sender, fields = envelope
        now_s = time.monotonic()
        if name == "spawn":
            self._on_spawn(sender, fields)
        elif name == "up":
            self._zygotes.on_up(fields["proc"], fields["pid"])
            self._link(fields["proc"], fields["path"])
            self._carry_out(self._table.on_up(fields["proc"]))
        elif name == "watch":
            proc = fields["proc"]
            is_controller = proc == self._controller
            self._carry_out([TellUp(sender, proc)] if is_controller else self._table.on_watch(proc, sender))
        elif name == "failing":
            self._table.on_failing(sender, FailureKind(fields["kind"]), fields["traceback"])
            self._tell(sender, "noted", {})
        elif name == "stop":
            self._carry_out(self._table.on_stop(fields["procs"], now_s=now_s, grace_s=fields["grace_s"]))
        elif name == "quit":
            self._quit()
        else:
            _log.warning("unknown request %r of %s", name, sender)

    def _on_spawn(self, owner: str, fields: dict[str, Any]) -> None:
        mesh, count = fields["mesh"], fields["count"]
        procs = [f"{mesh}.{rank}" for rank in range(count)]
        self._table.on_spawn(mesh, fields["name"], owner, [(proc, rank) for rank, proc in enumerate(procs)])
        for proc in procs:
            # The owner may order and ask in either way round; it hears of its own meshes unasked.
            self._table.on_watch(proc, owner)
        if owner in self._table.gone:
            self._on_not_started(procs, f"its owner {owner} had ended", "")
            return
        try:
            envs = self._device_envs(mesh, count, fields["gpus"])
            requests = [
                {
                    "proc": proc,
                    "path": f"{self._directory}/{proc}",
                    "env": {**fields["env"], **envs[rank]},
                    "cpus": fields["cpus"][rank] if fields["cpus"] else None,
                    "mem_nodes": fields["mem_nodes"][rank] if fields["mem_nodes"] else None,
                }
                for rank, proc in enumerate(procs)
            ]
            common = {"directory": self._directory, "host": self._host, "size": count, "boot_file": fields["boot_file"]}
            outputs = [self._open_outputs(proc) for proc in procs]
        except (OSError, ValueError) as error:
            self._on_not_started(procs, f"{type(error).__name__}: {error}", "")
            return
        self._zygotes.start(
            fields["zygote"], fields["preload"], fields["zygote_env"], fields["sys_path"], common, requests, outputs
        )

    def _device_envs(self, mesh: str, count: int, gpus: str) -> list[dict[str, str]]:
        if gpus == "none":
            return [{"CUDA_VISIBLE_DEVICES": ""}] * count
        if self._leases is None:
            devices = usable_devices(read_gpus().gpus, existing=os.environ.get("CUDA_VISIBLE_DEVICES"))
            self._leases = DeviceLeases(devices)
            self._devices = devices
        if not self._devices:
            return [{}] * count
        own = self._leases.acquire(mesh, count, share_gpus=gpus == "shared")
        return [device_env(index, self._devices) for index in own]

    def _open_outputs(self, proc: str) -> tuple[int, int]:
        """Make the pipes of a new proc; return the ends that it writes to."""
        tail = Tail()
        writers: list[int] = []
        for stream in ("stdout", "stderr"):
            reader, writer = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(reader, False)
            output = _Output(proc, stream, reader, tail)
            self._outputs.setdefault(proc, []).append(output)
            self._watch(reader, lambda output=output: self._read(output))
            writers.append(writer)
        return writers[0], writers[1]

    # processes:

    def _started_pids(self) -> set[int]:
        return {record.pid for record in self._table.procs.values() if record.pid is not None}

    def _on_started(self, proc: str, pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        self._pidfds[proc] = pidfd
        self._watch(pidfd, lambda: self._on_exit(proc))
        self._carry_out(self._table.on_started(proc, pid))

    def _on_not_started(self, procs: Iterable[str], detail: str, traceback: str) -> None:
        for proc in procs:
            self._close_outputs(proc)
            self._carry_out(self._table.on_not_started(proc, detail, traceback))

    def _on_exit(self, proc: str) -> None:
        pidfd = self._pidfds[proc]
        status = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        if status is None:
            return
        del self._pidfds[proc]
        self._unwatch(pidfd)
        os.close(pidfd)
        killed = status.si_code != os.CLD_EXITED
        tail = self._close_outputs(proc)
        commands = self._table.on_exit(
            proc,
            exit_code=None if killed else status.si_status,
            signum=status.si_status if killed else None,
            log_tail=tail,
            now_s=time.monotonic(),
        )
        self._carry_out(commands)
        self._forget(proc)

    def _forget(self, proc: str) -> None:
        link = self._links.pop(proc, None)
        if link is not None:
            link.close()
        with contextlib.suppress(OSError):
            os.unlink(f"{self._directory}/{proc}")
        mesh = proc.rpartition(".")[0]
        if not any(record.mesh == mesh for record in self._table.procs.values()):
            with contextlib.suppress(OSError):
                os.unlink(f"{self._directory}/{mesh}.boot")
            if self._leases is not None:
                self._leases.release(mesh)

    def _carry_out(self, commands: Iterable[Command]) -> None:
        for command in commands:
            if isinstance(command, TellUp):
                self._tell(command.to, "up", {"proc": command.proc, "path": f"{self._directory}/{command.proc}"})
            elif isinstance(command, TellGone):
                self._tell(command.to, "died", {"proc": command.proc, "failure": pack_failure(command.failure)})
            elif isinstance(command, AskStop):
                self._tell(command.proc, "stop", {})
            else:
                pidfd = self._pidfds.get(command.proc)
                if pidfd is not None:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(pidfd, command.signum)

    # links:

    def _link(self, proc: str, path: str) -> None:
        link = self._links[proc] = Link(proc, Link.flush)
        link.open(self._context, f"ipc://{path}")

    def _tell(self, proc: str, name: str, fields: dict[str, Any]) -> None:
        link = self._links.get(proc)
        if link is not None:
            link.send(wire.pack([wire.EVENT, name, fields]))

    # logs:

    def _read(self, output: _Output) -> bool:
        """Take what a proc has written; return whether more may be there at once."""
        try:
            chunk = os.read(output.fd, _READ_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            return False
        if not chunk:
            self._unwatch(output.fd)
            return False
        self._on_lines(output, output.splitter.feed(chunk))
        return True

    def _on_lines(self, output: _Output, lines: list[str]) -> None:
        if not lines:
            return
        output.tail.add(lines)
        self._logs.write(output.proc, lines)
        record = self._table.procs.get(output.proc)
        name, rank = (record.name, record.rank) if record is not None else (output.proc, 0)
        fields = {
            "mesh": output.proc.rpartition(".")[0],
            "name": name,
            "rank": rank,
            "stream": output.stream,
            "lines": lines,
        }
        self._tell(self._controller, "log", fields)

    def _close_outputs(self, proc: str) -> list[str]:
        """Drain and close a proc's pipes; return the last lines that it wrote."""
        outputs = self._outputs.pop(proc, [])
        for output in outputs:
            while self._read(output):
                pass
            self._on_lines(output, output.splitter.close())
            self._unwatch(output.fd)
            os.close(output.fd)
        self._logs.close(proc)
        return outputs[0].tail.lines() if outputs else []

    def _warn(self, text: str) -> None:
        fields = {"mesh": "agent", "name": "agent", "rank": 0, "stream": "stderr", "lines": [text]}
        self._tell(self._controller, "log", fields)

    # the end:

    def _on_controller_gone(self) -> None:
        self._unwatch(self._controller_fd)
        link = self._links.pop(self._controller, None)
        if link is not None:
            link.close()
        self._quit()

    def _quit(self) -> None:
        self._quitting = True
        commands = self._table.on_stop(list(self._table.procs), now_s=time.monotonic(), grace_s=GRACE_AFTER_ERROR_S)
        self._carry_out(commands)
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake_fd, 1)

    def _close(self) -> None:
        self._zygotes.close()
        self._tell(self._controller, "bye", {})
        for link in self._links.values():
            link.close(linger_ms=500)
        self._pull.close(0)
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)


def main(argv: list[str]) -> None:
    """Run an agent: ``DIRECTORY CONTROLLER CONTROLLER_PID HOST LOG_DIRECTORY``."""
    directory, controller, controller_pid, host, log_directory = argv
    adopt_orphans()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent_pid = os.getpid()
    # Before anything starts a thread: the seed of all zygotes is a copy of this process.
    if os.fork() == 0:
        from .zygote import serve

        ours.close()
        serve(theirs, agent=agent_pid, key="plain", modules=[], env={})
    theirs.close()
    logging.basicConfig(level=logging.WARNING, format="danaus agent: %(message)s")
    Agent(directory, controller, int(controller_pid), host, log_directory, ours).run()
