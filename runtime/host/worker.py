"""The life of a proc, from the fork to the exit.

The main thread runs the bootstrap, then the first actor; further actors get threads of their own. On stop every actor
is cleaned up before the process ends.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import faulthandler
import inspect
import logging
import os
import random
import signal
import sys
import threading
import time
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from ..address import AGENT
from ..collectives.store import store_spawn
from ..config import stuck_s
from ..context import ActorInstance, bind_instance, set_local_proc
from ..failure import FailureKind, unpack_failure
from ..hooks import Question
from ..invoke import local_traceback
from ..overdue import OverdueNotes
from ..proc import ROOT, LocalProc
from ..runner import ActorRunner
from ..testing import armed as faults
from ..workspace.paths import inherit, map_path
from .boot import read_boot_file
from .cpus import Binding, apply_binding
from .kernel import default_action, set_process_name
from .oom import be_likelier
from .stacks import arm, stacks_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..messages import wire

STOP_LIMIT_S: Final = 3.5
"""Time that all actors of a proc together have for their cleanup."""

TOLD_WITHIN_S: Final = 0.5
"""Time for the agent to say that its host is taken away, when this process has had a SIGTERM."""

_log = logging.getLogger("danaus")


def run_worker(request: dict[str, Any], out: int, err: int, agent: int) -> None:
    """Be a proc; returns never.

    Args:
        request: What the agent asked for; see ``agent.py``.
        out: Descriptor that becomes standard output.
        err: Descriptor that becomes standard error.
        agent: Pid of the host agent, which this process does not outlive.
    """
    _take_stdio(out, err)
    be_likelier()
    if stuck_s() > 0:
        with contextlib.suppress(OSError):
            arm(stacks_file(request["path"]), tracer=agent)
    os.environ.update(request["env"])
    set_process_name(request["proc"])
    apply_binding(Binding(_numbers(request.get("cpus")), _numbers(request.get("mem_nodes"))))
    _reseed()
    local = LocalProc(
        request["proc"], directory=request["directory"], path=request["path"], host=request["host"]
    )  # fmt: skip
    local.mesh_size = request["size"]
    local.host_address = request["host_address"]
    set_local_proc(local)
    worker = Worker(local, request)
    worker.run()


def _numbers(values: list[int] | None) -> frozenset[int] | None:
    return None if values is None else frozenset(values)


class Worker:
    """One proc: its actors, and the jobs of its main thread."""

    def __init__(self, local: LocalProc, request: dict[str, Any]) -> None:
        self._local, self._request = local, request
        self._jobs: SimpleQueue[ActorRunner | None] = SimpleQueue()
        self._main_is_free = True
        self._is_ready = False
        self._waiting: list[Callable[[], None]] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        local.on_spawn = self._on_spawn
        local.on_unknown_actor = self._on_unknown_actor
        self._reason_noted = threading.Event()
        local.on_event["noted"] = lambda _fields: self._reason_noted.set()
        local.on_event["inject"] = lambda fields: faults.on_inject(local, fields)
        local.on_event["stop"] = self._on_stop
        local.on_event["adopt"] = self._on_adopt
        local.on_event["drain"] = self._on_drain
        OverdueNotes(local, _log.warning)
        local.on_event["ping"] = lambda fields: local.request("pong", fields)
        local.on_event["log_level"] = lambda fields: logging.getLogger().setLevel(fields["level"])
        local.when_ready = self._when_ready
        self._is_ending = False

    def run(self) -> None:
        """Live until stopped; then exit the process."""
        local = self._local
        signal.signal(signal.SIGTERM, self._on_sigterm)
        local.start(os.path.join(local.directory, AGENT))
        local.request("up", {"proc": local.proc_id, "path": self._request["path"], "pid": local.pid})
        if not self._bootstrap():
            self._exit(1)
        local.run_soon(self._on_ready)
        while (runner := self._jobs.get()) is not None:
            runner.run()
            bind_instance(ActorInstance(local, None, ROOT, None))
            self._main_is_free = True
        deadline_s = time.monotonic() + STOP_LIMIT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
        self._exit(0)

    def _exit(self, code: int) -> None:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        self._local.stop()
        os._exit(code)

    def _bootstrap(self) -> bool:
        local = self._local
        try:
            boot = read_boot_file(self._request["boot_file"])
            mapped = self._request["path_map"]
            inherit(local, self._request["workspaces"], mapped)
            sys.path[:] = self._request["sys_path"]
            sys.argv[:] = [map_path(boot.argv0, mapped)]
            with contextlib.suppress(OSError):
                os.chdir(map_path(boot.directory, mapped))
            for module in self._request["imports"]:
                __import__(module)
            set_torch_threads()
            outcome = boot.bootstrap() if boot.bootstrap is not None else None
            if inspect.iscoroutine(outcome):
                asyncio.run(outcome)
        except BaseException as error:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
            text = local_traceback(error)
            local.request("failing", {"kind": FailureKind.BOOTSTRAP_ERROR.value, "traceback": text})
            # Else the agent may see the exit before the reason for it.
            self._reason_noted.wait(1.0)
            return False
        return True

    # the I/O thread

    def _when_ready(self, task: Callable[[], None]) -> None:
        if self._is_ready:
            task()
        else:
            self._waiting.append(task)

    def _on_ready(self) -> None:
        self._is_ready = True
        self._tell_ready()
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            task()

    def _tell_ready(self) -> None:
        """From now on the agent expects this thread to answer, and tells of it where it does not."""
        main, io = threading.main_thread(), self._local.thread
        fields = {
            "io_thread": io.native_id,
            "threads": {thread.ident: thread.name for thread in (main, io)},
            "stacks": stacks_file(self._request["path"]),
        }
        self._local.request("ready", fields)

    def _on_spawn(self, envelope: wire.Envelope) -> None:
        runner = ActorRunner(self._local, envelope)
        before = self._local.actors.get(runner.key)
        if before is not None:
            runner.follow(before)
        self._local.add_actor(runner.key, runner)
        self._when_ready(lambda: self._launch(runner))

    def _on_adopt(self, request: dict[str, Any]) -> None:
        """Take the place of a rank that was lost; so far this process was a spare."""
        os.environ.update(request["env"])
        set_process_name(request["proc"])
        apply_binding(Binding(_numbers(request.get("cpus")), _numbers(request.get("mem_nodes"))))
        self._local.rename(request["proc"], request["path"])
        set_local_proc(self._local)
        self._local.request("up", {"proc": request["proc"], "path": request["path"], "pid": self._local.pid})
        if self._is_ready:
            self._tell_ready()

    def _on_sigterm(self, signum: int, _frame: object) -> None:
        """Some schedulers signal every process of a job at once: what is to drain is not to end by that."""
        if os.getpid() != self._local.pid:
            # A process that was forked from this one.
            _end_by(signum)
        if not self._is_ending:
            self._local.run_at(time.monotonic() + TOLD_WITHIN_S, lambda: self._end_unless_told(signum))

    def _end_unless_told(self, signum: int) -> None:
        if not self._is_ending:
            _end_by(signum)

    def _on_drain(self, fields: dict[str, Any]) -> None:
        """The host is about to be taken away: call the actors' ``__drain__``, and say when all have returned."""
        self._is_ending = True
        runners = [runner for runner in self._local.actors.values() if runner.has_hook("__drain__")]
        waiting = {runner.key for runner in runners}

        def on_drained(key: str) -> None:
            waiting.discard(key)
            if not waiting:
                self._local.request("drained", {})

        for runner in runners:
            done = partial(on_drained, runner.key)
            runner.ask(Question("__drain__", fields["seconds"], partial(_run_soon, self._local, done)))
        if not runners:
            self._local.request("drained", {})

    def _on_unknown_actor(self, key: str) -> bool:
        """Make the store that process groups form through when it is first asked."""
        envelope = store_spawn(key, self._local.proc_id)
        if envelope is None:
            return False
        runner = ActorRunner(self._local, envelope)
        self._local.add_actor(key, runner)
        self._when_ready(lambda: self._launch_apart(runner))
        return True

    def _launch(self, runner: ActorRunner) -> None:
        if self._main_is_free:
            self._main_is_free = False
            self._jobs.put(runner)
        else:
            self._launch_apart(runner)

    def _launch_apart(self, runner: ActorRunner) -> None:
        thread = threading.Thread(target=self._run_apart, args=(runner,), name=f"danaus-{runner.key}", daemon=True)
        # Started first: the main thread may be about to join them.
        thread.start()
        self._threads = [*(other for other in self._threads if other.is_alive()), thread]

    @staticmethod
    def _run_apart(runner: ActorRunner) -> None:
        set_torch_threads()
        runner.run()

    def _on_stop(self, fields: dict[str, Any]) -> None:
        self._is_ending = True
        why = fields["failure"] and unpack_failure(fields["failure"])
        for runner in reversed(list(self._local.actors.values())):
            runner.request_stop(why)
        self._jobs.put(None)


def _end_by(signum: int) -> None:
    """End this process as if it had no handler for a signal (any thread)."""
    default_action(signum)
    os.kill(os.getpid(), signum)


def _run_soon(local: LocalProc, done: Callable[[], None], _outcome: bool | None) -> None:
    local.run_soon(done)


def set_torch_threads() -> None:
    """Give the calling thread the number of OpenMP threads that the environment asks for; it is set per thread."""
    torch = sys.modules.get("torch")
    count = os.environ.get("OMP_NUM_THREADS", "")
    if torch is not None and count.isdigit():
        torch.set_num_threads(int(count))


def _take_stdio(out: int, err: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for fd in (null, out, err):
        os.close(fd)
    # New objects: those of the zygote may have been closed or wrapped by what it imported.
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False)  # noqa: SIM115  lives as long as the process
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False)  # noqa: SIM115  lives as long as the process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable(file=2)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _reseed() -> None:
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    torch = sys.modules.get("torch")
    if torch is not None:
        # Not torch.manual_seed: it looks for every accelerator there is and touches megabytes of shared pages.
        torch.default_generator.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
