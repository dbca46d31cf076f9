"""The controller: the process whose script drives the job. It starts the host agent and ends the job with itself."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from .config import GRACE_AFTER_ERROR_S, KEEP_LOG_DIRS, log_root, socket_root
from .context import set_local_proc
from .failure import FailureKind, MeshFailure
from .host import interpreter
from .log_printer import LogPrinter
from .messages import wire
from .messages.link import Link
from .messages.payload import dump
from .proc import AGENT, LocalProc
from .runner import ActorRunner

if TYPE_CHECKING:
    from pathlib import Path

CONTROLLER: Final = "controller.0"
END_LIMIT_S: Final = 7.0

_controller: Controller | None = None
_start_lock = threading.Lock()


def start_controller() -> None:
    """Make this process the controller; the host agent starts with the first request to it."""
    global _controller
    with _start_lock:
        if _controller is None:
            _controller = Controller()


class Controller:
    """The runtime of the user's script."""

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="danaus-", dir=socket_root())
        self.host = socket.gethostname()
        self.logs: str | None = None
        self.local = _ControllerProc(self)
        self._printer = LogPrinter()
        self._agent: subprocess.Popen[bytes] | None = None
        self.request_lock = threading.RLock()
        self._said_bye = threading.Event()
        self._pid = os.getpid()
        self.local.on_spawn = self._on_spawn
        self.local.on_unknown_actor = self._on_unknown_actor
        self.local.on_event["agent_up"] = self._on_agent_up
        self.local.on_event["log"] = self._printer.on_log
        self.local.on_event["log_option"] = self._printer.on_option
        self.local.on_event["bye"] = lambda _fields: self._said_bye.set()
        self.local.on_gone.append(self._on_gone)
        self.local.report = self._report
        self._last_report = "", ""
        set_local_proc(self.local)
        self.local.start(None)
        atexit.register(self._at_exit)
        os.register_at_fork(after_in_child=_forget_in_child)

    def ensure_agent(self) -> None:
        """Start the host agent, if it was not."""
        with self.request_lock:
            if self._agent is None:
                self.logs = _new_log_directory()
                arguments = [self.directory, CONTROLLER, str(os.getpid()), self.host, self.logs]
                self._agent = interpreter.start("danaus.runtime.host.agent", *arguments, start_new_session=True)
                threading.Thread(target=self._watch_agent, name="danaus-agent-watch", daemon=True).start()

    def _watch_agent(self) -> None:
        assert self._agent is not None
        code = self._agent.wait()
        if _controller is not self:
            self._said_bye.set()
        elif not self._said_bye.is_set():
            self.local.run_soon(lambda: self._on_agent_gone(code))

    def _on_agent_gone(self, code: int) -> None:
        """Without its agent this host has no processes any more; the next request starts one (I/O thread)."""
        with self.request_lock:
            lost = dict.fromkeys([*self.local.links, *self.local.spawned])
            self.local.renew_agent_link()
            self._agent = None
        for proc in lost:
            if proc not in {AGENT, CONTROLLER}:
                failure = MeshFailure(
                    kind=FailureKind.HOST_LOST,
                    mesh=proc.rpartition(".")[0].rsplit("-", 1)[0],
                    rank=int(proc.rpartition(".")[2]),
                    host=self.host,
                    detail=f"the host agent ended with code {code}, and its processes with it",
                )
                self.local.mark_gone(proc, failure)

    def _on_agent_up(self, fields: dict[str, Any]) -> None:
        self.local.links[AGENT].open(self.local.context, f"ipc://{fields['path']}")

    def _on_gone(self, _proc: str, failure: MeshFailure) -> None:
        if failure.kind is not FailureKind.STOPPED:
            self._report(failure)

    def _report(self, failure: MeshFailure) -> None:
        """Print what happened; what befell all ranks of a mesh alike, once (I/O thread)."""
        shared = failure.traceback or failure.detail
        if shared and (failure.mesh, shared) == self._last_report:
            return
        self._last_report = failure.mesh, shared
        self._printer.note(f"danaus: {failure.report()}")

    def _on_spawn(self, envelope: wire.Envelope) -> None:
        runner = ActorRunner(self.local, envelope)
        self.local.add_actor(runner.key, runner)
        threading.Thread(target=runner.run, name=f"danaus-{runner.key}", daemon=True).start()

    def _on_unknown_actor(self, key: str) -> bool:
        """Make a built-in actor, the registry or a store, when it is first asked (I/O thread)."""
        from .collectives.store import store_spawn
        from .registry import REGISTRY_KEY, registry

        spawn = store_spawn(key, CONTROLLER)
        if key == REGISTRY_KEY:
            spawn = [wire.SPAWN, REGISTRY_KEY, CONTROLLER, dump((registry(), (), {}, None)).body, None]
        if spawn is None:
            return False
        self._on_spawn(spawn)
        return True

    def shutdown(self) -> None:
        """End the job: stop every process, print what they wrote, remove every file. Safe to call twice."""
        global _controller
        if os.getpid() != self._pid or _controller is not self:
            return
        _controller = None
        deadline_s = time.monotonic() + END_LIMIT_S
        actors_deadline_s = time.monotonic() + GRACE_AFTER_ERROR_S
        for runner in reversed(list(self.local.actors.values())):
            runner.request_stop()
        for runner in list(self.local.actors.values()):
            runner.ended.wait(max(0.0, actors_deadline_s - time.monotonic()))
        if self._agent is not None:
            self.local.request("quit", {})
            self._said_bye.wait(max(0.0, deadline_s - time.monotonic()))
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._agent.wait(max(0.1, deadline_s - time.monotonic()))
            if self._agent.poll() is None:
                self._agent.kill()
                self._agent.wait()
        self._printer.close()
        set_local_proc(None)
        self.local.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _at_exit(self) -> None:
        self.shutdown()


class _ControllerProc(LocalProc):
    """The controller's runtime: the first request to the agent starts it."""

    def __init__(self, controller: Controller) -> None:
        path = os.path.join(controller.directory, CONTROLLER)
        super().__init__(CONTROLLER, directory=controller.directory, path=path, host=controller.host)
        self._controller = controller
        self.spawned: list[str] = []

    def request(self, name: str, fields: Any) -> None:
        with self._controller.request_lock:
            self._controller.ensure_agent()
            if name == "spawn":
                self.spawned += [f"{fields['mesh']}.{rank}" for rank in range(fields["count"])]
            super().request(name, fields)

    def renew_agent_link(self) -> None:
        """Forget the agent that has ended; what is sent from now on waits for the next."""
        self.links[AGENT].close()
        self.links[AGENT] = Link(AGENT, self._mark_dirty)


def stop_controller() -> None:
    """End the job, if this process is its controller."""
    if _controller is not None:
        _controller.shutdown()


def _forget_in_child() -> None:
    """A process forked by the user's script is no controller: threads and sockets stayed with the parent."""
    global _controller
    _controller = None
    set_local_proc(None)


def _new_log_directory() -> str:
    root = log_root()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = tempfile.mkdtemp(prefix=f"{stamp}-{os.getpid()}-", dir=root)
    _prune(root)
    return path


def _prune(root: Path) -> None:
    jobs = sorted((entry for entry in root.iterdir() if entry.is_dir()), key=lambda entry: entry.stat().st_mtime)
    for old in jobs[:-KEEP_LOG_DIRS]:
        shutil.rmtree(old, ignore_errors=True)
