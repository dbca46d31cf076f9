"""The controller: the process whose script drives the job. It starts the host agent and ends the job with itself."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from .address import AGENT, CONTROLLER, incarnation_of, mesh_of, name_of, next_address, rank_of
from .config import GRACE_AFTER_ERROR_S, grace_s, preempt_s, socket_root, stuck_s
from .context import set_local_proc
from .failure import FailureKind, MeshFailure
from .host import interpreter
from .host.descendants import JOB_VARIABLE, end_descendants
from .host.log_files import new_log_directory
from .interrupts import InterruptsHeld, end_as_interrupted
from .log_printer import LogPrinter
from .messages import wire
from .messages.link import Link
from .messages.payload import dump
from .overdue import OverdueNotes
from .proc import LocalProc
from .runner import ActorRunner
from .supervision.root import Root
from .testing import armed as faults

if TYPE_CHECKING:
    import subprocess

END_LIMIT_S: Final = 7.0
HURRY_LIMIT_S: Final = 1.5
"""Time for the host agent to kill what is left, once an interrupt has cut the end short."""

_SHUT_DOWN: Final = "the runtime was shut down (shutdown_context(), or the end of the script)"

_controller: Controller | None = None
_past: dict[str, MeshFailure] = {}
"""Processes of jobs that this process has ended: handles on them may still be used by mistake."""
_start_lock = threading.Lock()


def start_controller() -> None:
    """Make this process the controller; the host agent starts with the first request to it."""
    global _controller
    with InterruptsHeld(), _start_lock:
        if _controller is None:
            _controller = Controller()


class Controller:
    """The runtime of the user's script."""

    def __init__(self) -> None:
        self.host = socket.gethostname()
        self.logs: str | None = None
        self.local = _ControllerProc(self)
        self._printer = LogPrinter()
        self._agent: subprocess.Popen[bytes] | None = None
        self._watchers: list[threading.Thread] = []
        self.request_lock = threading.RLock()
        self._said_bye = threading.Event()
        self._pid = os.getpid()
        self._kept: dict[str, Any] = {}
        self._is_preempted = False
        self.local.on_spawn = self._on_spawn
        self.local.on_unknown_actor = self._on_unknown_actor
        self.local.on_event["agent_up"] = self._on_agent_up
        self.local.on_event["inject"] = lambda fields: faults.on_inject(self.local, fields)
        OverdueNotes(self.local, lambda text: self._printer.note(f"danaus: {text}"))
        self.local.on_event["handover"] = self._on_handover
        self.local.on_event["log"] = self._printer.on_log
        self.local.on_event["log_option"] = self._printer.on_option
        self.local.on_event["bye"] = lambda _fields: self._said_bye.set()
        self.local.gone.update(_past)
        self._root = Root(self.local, self._printer)
        set_local_proc(self.local)
        self.local.start(None)
        atexit.register(self._at_exit)
        os.register_at_fork(after_in_child=_forget_in_child)

    def ensure_agent(self) -> None:
        """Start the host agent, if it was not."""
        if self._agent is None:
            with InterruptsHeld(), self.request_lock:
                if self._agent is None:
                    self._start_agent()

    def _start_agent(self) -> None:
        # Else the agent would find them wrong, and end.
        stuck_s()
        preempt_s()
        grace_s()
        self.logs = new_log_directory("")
        # Just before the agent, which removes it even if this process is killed now.
        directory = self.local.directory = tempfile.mkdtemp(prefix="danaus-", dir=socket_root())
        arguments = [directory, str(os.getpid()), self.host, self.logs]
        bye = self._said_bye = threading.Event()
        agent = self._agent = interpreter.start(
            "danaus.runtime.host.agent_main", *arguments, env={JOB_VARIABLE: directory}, start_new_session=True
        )
        self.local.run_soon(lambda: self.local.bind(os.path.join(directory, CONTROLLER)))
        if self._kept:
            kept, self._kept = self._kept, {}
            self.local.links[AGENT].send(wire.pack([wire.REQUEST, "take_over", CONTROLLER, {"kept": kept}]))
        watcher = threading.Thread(
            target=self._watch_agent, args=(agent, bye, directory), name="danaus-agent-watch", daemon=True
        )
        self._watchers = [*(other for other in self._watchers if other.is_alive()), watcher]
        watcher.start()

    def _watch_agent(self, agent: subprocess.Popen[bytes], bye: threading.Event, directory: str) -> None:
        code = agent.wait()
        bye.set()
        if _controller is self:
            self.local.run_soon(lambda: self._on_agent_gone(code))
        if code != 0:
            end_descendants(directory)
            shutil.rmtree(directory, ignore_errors=True)

    def _on_agent_gone(self, code: int) -> None:
        """Without its agent this host has no processes any more; the next request starts one (I/O thread)."""
        with self.request_lock:
            current = [self.local.resolve(proc) for proc in self.local.spawned]
            lost = dict.fromkeys([*self.local.links, *current])
            self.local.renew_agent_link()
            self._agent = None
        for proc in lost:
            if proc not in {AGENT, CONTROLLER}:
                owned = self.local.supervisor.procs.get(mesh_of(proc))
                may_follow = owned is not None and owned.policy is not None and proc not in self.local.gone
                failure = MeshFailure(
                    kind=FailureKind.PREEMPTED if self._is_preempted else FailureKind.HOST_LOST,
                    mesh=name_of(proc),
                    rank=rank_of(proc),
                    host=self.host,
                    incarnation=incarnation_of(proc),
                    detail=f"the host agent ended with code {code}, and its processes with it",
                    restarts=may_follow,
                )
                self.local.on_died(proc, failure, next_address(proc) if may_follow else None)
        if self.local.hosts is not None:
            self.local.hosts.on_agent_gone(code)
        self._is_preempted = False

    def _on_handover(self, fields: dict[str, Any]) -> None:
        """The agent ends because its host is taken away; the next one gets what it has kept (I/O thread)."""
        self._kept = fields["kept"]
        self._is_preempted = True

    def _on_agent_up(self, fields: dict[str, Any]) -> None:
        self.local.links[AGENT].open(self.local.context, f"ipc://{fields['path']}")

    def _on_spawn(self, envelope: wire.Envelope) -> None:
        runner = ActorRunner(self.local, envelope)
        before = self.local.actors.get(runner.key)
        if before is not None:
            runner.follow(before)
        self.local.add_actor(runner.key, runner)
        threading.Thread(target=runner.run, name=f"danaus-{runner.key}", daemon=True).start()

    def _on_unknown_actor(self, key: str) -> bool:
        """Make a built-in actor, the registry or a store, when it is first asked (I/O thread)."""
        from .collectives.store import store_spawn
        from .registry import REGISTRY_KEY, registry

        spawn = store_spawn(key, CONTROLLER)
        if key == REGISTRY_KEY:
            body = dump((registry(), (), {}, None)).body
            spawn = [wire.SPAWN, REGISTRY_KEY, CONTROLLER, [0, False, None, None], body, None]
        if spawn is None:
            return False
        self._on_spawn(spawn)
        return True

    def shutdown(self) -> None:
        """End the job: stop every process, print what they wrote, remove every file. Safe to call twice.

        An interrupt is raised once all is gone: what is still there then is killed instead of waited for.
        """
        global _controller
        if os.getpid() != self._pid or _controller is not self:
            return
        _controller = None
        # From here on a rank that is lost ends nothing that does not end already.
        self.local.supervisor.at_root = _ignore
        hurries = True
        try:
            self._end_job()
            hurries = False
        finally:
            with InterruptsHeld():
                if hurries:
                    self._end_agent(time.monotonic() + HURRY_LIMIT_S, grace_s=0.0)
                self._release()

    def _end_job(self) -> None:
        self.local.run_soon(self._fail_calls)
        deadline_s = time.monotonic() + END_LIMIT_S
        actors_deadline_s = time.monotonic() + GRACE_AFTER_ERROR_S
        for runner in reversed(list(self.local.actors.values())):
            runner.request_stop()
        for runner in list(self.local.actors.values()):
            runner.ended.wait(max(0.0, actors_deadline_s - time.monotonic()))
        self._end_agent(deadline_s, grace_s=GRACE_AFTER_ERROR_S)

    def _end_agent(self, deadline_s: float, *, grace_s: float) -> None:
        if self._agent is None:
            return
        self.local.request("quit", {"grace_s": grace_s})
        self._said_bye.wait(max(0.0, deadline_s - time.monotonic()))
        self._watchers[-1].join(max(0.1, deadline_s - time.monotonic()))

    def _release(self) -> None:
        if self._agent is not None and self._watchers[-1].is_alive():
            self._agent.kill()
        for watcher in self._watchers:
            watcher.join()
        self._root.close()
        self._printer.close()
        set_local_proc(None)
        self.local.stop()
        self._fail_waiting()

    def _fail_calls(self) -> None:
        """Fail what is asked of processes, which go on to send what their cleanup has to say (I/O thread)."""
        ports = self.local.ports
        for proc, failure in self.failures(_SHUT_DOWN).items():
            if proc != CONTROLLER:
                for port in [port for port, sink in list(ports.items()) if sink.on_gone(proc, failure)]:
                    ports.pop(port, None)

    def _fail_waiting(self) -> None:
        """Nobody answers any more: fail what waits, and what will be asked of this job's meshes."""
        failures = self.failures(_SHUT_DOWN)
        for proc, failure in failures.items():
            self.local.mark_gone(proc, failure)
        _past.update(failures)
        del _past[CONTROLLER]

    def failures(self, detail: str) -> dict[str, MeshFailure]:
        """What became of every process of this job, for those who ask too late."""
        return {
            proc: MeshFailure(
                kind=FailureKind.STOPPED,
                mesh=name_of(proc),
                rank=rank_of(proc),
                host=self.host,
                detail=detail,
            )
            for proc in [CONTROLLER, *self.local.links, *map(self.local.resolve, self.local.spawned)]
            if proc != AGENT
        }

    def _at_exit(self) -> None:
        try:
            self.shutdown()
        except KeyboardInterrupt:
            end_as_interrupted()
        except SystemExit:
            # Of a signal's handler: the script is on its way out already.
            return


class _ControllerProc(LocalProc):
    """The controller's runtime: the first request to the agent starts it."""

    def __init__(self, controller: Controller) -> None:
        super().__init__(CONTROLLER, directory="", path=None, host=controller.host)
        self._controller = controller
        self.spawned: list[str] = []

    def job_directory(self) -> str:
        self._controller.ensure_agent()
        return self.directory

    def request(self, name: str, fields: Any) -> None:
        with self._controller.request_lock:
            self._controller.ensure_agent()
            if name == "spawn":
                self.spawned += fields["procs"]
            super().request(name, fields)

    def renew_agent_link(self) -> None:
        """Forget the agent that has ended; what is sent from now on waits for the next."""
        self.links[AGENT].close()
        self.links[AGENT] = Link(AGENT, self._mark_dirty)


def _ignore(_failure: MeshFailure) -> None:
    return


def stop_controller() -> None:
    """End the job, if this process is its controller."""
    if _controller is not None:
        _controller.shutdown()


def _forget_in_child() -> None:
    """A process forked by the user's script is no controller: threads and sockets stayed with the parent."""
    global _controller
    if _controller is not None:
        _past.update(_controller.failures("this process was forked from the one that had spawned it; spawn its own"))
        del _past[CONTROLLER]
    _controller = None
    set_local_proc(None)
