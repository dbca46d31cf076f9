"""Forks processes that have their modules imported already.

A zygote imports and forks, nothing else: no thread, no OpenMP work, no store, no CUDA, since each of those breaks its
children. It forks procs through a process in between, so that they become the agent's own children, and it forks
further zygotes with more modules imported.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
import traceback
import weakref
from typing import TYPE_CHECKING, Any, Final

import msgpack

from .kernel import die_with_parent, num_threads, set_process_name

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_MESSAGE: Final = 256 << 10
MAX_FDS: Final = 128


def name_of(key: str) -> str:
    """The process name of a zygote, which its children have until they take their own."""
    return f"danaus-zyg-{key[:4]}"


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return the next message and its descriptors, or None at the end."""
    data, fds, _, _ = socket.recv_fds(sock, MAX_MESSAGE, MAX_FDS)
    return (msgpack.unpackb(data), list(fds)) if data else None


def send(sock: socket.socket, message: dict[str, Any], fds: list[int] | None = None) -> None:
    """Send one message with descriptors."""
    socket.send_fds(sock, [bytes(msgpack.packb(message) or b"")], fds or [])


def serve(sock: socket.socket, *, agent: int, key: str, modules: list[str], env: dict[str, str]) -> None:
    """Import ``modules`` and fork on request, until the socket ends. Does not return."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        die_with_parent(agent)
        set_process_name(name_of(key))
        if not _import(sock, modules, env):
            os._exit(0)
        # Whatever children would import each for themselves, they find shared.
        from .worker import run_worker

        _skip_finalizers()
        gc.collect()
        gc.freeze()
        while (received := receive(sock)) is not None:
            message, fds = received
            if message["op"] == "zygote":
                _fork_zygote(sock, message, fds, agent)
            else:
                _fork_procs(sock, message, fds, agent, run_worker)
        code = 0
    except BaseException:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
        traceback.print_exc()
    finally:
        os._exit(code)


def _import(sock: socket.socket, modules: list[str], env: dict[str, str]) -> bool:
    os.environ.update(env)
    if modules:
        # Thread counts are read at import; procs set their own afterwards.
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    module = ""
    try:
        for module in modules:
            importlib.import_module(module)
    except BaseException:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
        send(sock, {"failed": traceback.format_exc(), "module": module})
        return False
    if num_threads() > 1:
        send(sock, {"threaded": num_threads()})
        return False
    return True


def _skip_finalizers() -> None:
    """Leave finalizers of what was preloaded out of the children's exit: torch has thousands, 25 ms a process."""
    for finalizer in list(weakref.finalize._registry):  # pyright: ignore[reportAttributeAccessIssue]
        finalizer.atexit = False


def _fork_zygote(sock: socket.socket, message: dict[str, Any], fds: list[int], agent: int) -> None:
    def child() -> None:
        sock.close()
        sys.path[:] = message["sys_path"]
        serve(
            socket.socket(fileno=fds[0]),
            agent=agent,
            key=message["key"],
            modules=message["modules"],
            env=message["env"],
        )

    [pid] = _fork_away([child], agent)
    send(sock, {"zygote": message["key"], "pid": pid})
    for fd in fds:
        os.close(fd)


def _fork_procs(
    sock: socket.socket, message: dict[str, Any], fds: list[int], agent: int, run_worker: Callable[..., object]
) -> None:
    children = []
    for index, proc in enumerate(message["procs"]):

        def child(index: int = index, proc: dict[str, Any] = proc) -> None:
            sock.close()
            out, err = fds[2 * index], fds[2 * index + 1]
            for fd in fds:
                if fd not in {out, err}:
                    os.close(fd)
            run_worker({**message, **proc}, out, err, agent)

        children.append(child)
    pids = _fork_away(children, agent)
    for fd in fds:
        os.close(fd)
    send(sock, {"started": [[proc["proc"], pid] for proc, pid in zip(message["procs"], pids, strict=True)]})


def _fork_away(children: list[Any], agent: int) -> list[int]:
    """Run each of ``children`` in a process of its own that is the agent's child; return their pids."""
    reader, writer = os.pipe()
    between = os.fork()
    if between == 0:
        os.close(reader)
        pids = []
        for child in children:
            pid = os.fork()
            if pid == 0:
                os.close(writer)
                _become(child, agent)
            pids.append(pid)
        with contextlib.suppress(BrokenPipeError):
            # The zygote was killed meanwhile; the agent finds what it had begun.
            os.write(writer, bytes(msgpack.packb(pids) or b""))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(between, 0)
    return msgpack.unpackb(data)


def _become(child: Any, agent: int) -> None:
    code = 1
    try:
        # Until the process in between has exited, it is the parent.
        between = os.getppid()
        while between == os.getppid() != agent:
            os.sched_yield()
        die_with_parent(agent)
        child()
        code = 0
    except BaseException:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
        with contextlib.suppress(OSError):
            traceback.print_exc()
    finally:
        os._exit(code)


def main(argv: list[str]) -> None:
    """Be a seed started from nothing: ``FD AGENT_PID``."""
    serve(socket.socket(fileno=int(argv[0])), agent=int(argv[1]), key="plain", modules=[], env={})
