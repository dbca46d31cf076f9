"""The agent's side of its zygotes: one per set of preloaded modules, each forked from the seed at first use."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgpack

from . import interpreter
from .kernel import end_children, end_children_named
from .zygote import name_of, receive, send

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_BATCH: Final = 60
_BATCH_BYTES: Final = 96 << 10
_SEED: Final = "plain"


class _OnFailed(Protocol):
    def __call__(self, procs: Iterable[str], detail: str, traceback: str) -> None: ...


class _Zygote:
    def __init__(self, key: str, sock: socket.socket) -> None:
        self.key, self.sock = key, sock
        self.is_second = False
        self.pid: int | None = None
        self.pending: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, int]]] = {}


class Zygotes:
    """Starts processes from the right zygote, and deals with zygotes that fail.

    A zygote that turns out to have threads cannot be forked safely: its processes start from the seed instead and
    import for themselves. A zygote that dies takes no process with it, and the next start makes a new one.
    """

    def __init__(
        self,
        seed: socket.socket,
        *,
        watch: Callable[[int, Callable[[], None]], None],
        unwatch: Callable[[int], None],
        on_started: Callable[[str, int], None],
        started: Callable[[], set[int]],
        on_failed: _OnFailed,
        warn: Callable[[str], None],
    ) -> None:
        self._watch, self._unwatch = watch, unwatch
        self._on_started, self._started, self._on_failed, self._warn = on_started, started, on_failed, warn
        self._zygotes: dict[str, _Zygote] = {}
        self._unforkable: set[str] = set()
        self._modules: dict[str, Sequence[str]] = {}
        self._made_with: dict[str, tuple[Sequence[str], dict[str, str], list[str]]] = {_SEED: ((), {}, [])}
        self._add(_SEED, seed)

    def start(
        self,
        key: str,
        modules: Sequence[str],
        env: dict[str, str],
        sys_path: list[str],
        common: dict[str, Any],
        procs: list[dict[str, Any]],
        outputs: list[tuple[int, int]],
    ) -> None:
        """Fork ``procs`` from the zygote ``key``, making it if need be. Returns at once; takes over ``outputs``."""
        self._modules[key] = modules
        self._retire(key, modules, env, sys_path)
        if key in self._unforkable:
            key = _SEED
        else:
            self._made_with[key] = modules, env, sys_path
        zygote = self._zygotes.get(key) or self._make(key, modules, env, sys_path)
        imports = [] if zygote.key != _SEED else list(modules)
        self._fork(zygote, {**common, "imports": imports}, procs, outputs)

    def _retire(self, key: str, modules: Sequence[str], env: dict[str, str], sys_path: list[str]) -> None:
        """End the zygote that has preloaded these modules as they were before they changed."""
        for old in [each for each in self._made_with if each not in {key, _SEED}]:
            made_with = self._made_with[old]
            zygote = self._zygotes.get(old)
            is_same = (list(made_with[0]), *made_with[1:]) == (list(modules), env, sys_path)
            if not is_same or (zygote is not None and zygote.pending):
                continue
            del self._made_with[old]
            self._modules.pop(old, None)
            self._unforkable.discard(old)
            if zygote is not None:
                self._drop(zygote)
                self._reap(zygote.pid)

    def _reap(self, pid: int | None) -> None:
        """Take the exit status of a zygote that is to end; any other child's is taken as it ends, or with the agent."""
        if pid is None:
            return
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return

        def on_exit() -> None:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
            self._unwatch(pidfd)
            os.close(pidfd)

        self._watch(pidfd, on_exit)

    def on_up(self, proc: str, pid: int) -> None:
        """A process says that it runs, which may come before its zygote's word, or in place of it."""
        for zygote in list(self._zygotes.values()):
            self._take_started(zygote, proc, pid)

    def _take_started(self, zygote: _Zygote, proc: str, pid: int) -> None:
        if proc in zygote.pending and os.path.exists(f"/proc/{pid}"):
            _close(zygote.pending.pop(proc)[2])
            self._on_started(proc, pid)

    def give_up_pending(self) -> list[str]:
        """Forget what has not started, and return it; what starts nevertheless ends with :meth:`close`."""
        given_up: list[str] = []
        for zygote in self._zygotes.values():
            pending, zygote.pending = zygote.pending, {}
            for proc, (_, _, pair) in pending.items():
                _close(pair)
                given_up.append(proc)
        return given_up

    def close(self) -> None:
        """End every zygote, and what procs that have ended left behind, and wait until they are gone."""
        for zygote in list(self._zygotes.values()):
            self._drop(zygote)
        end_children()

    def _add(self, key: str, sock: socket.socket) -> _Zygote:
        zygote = self._zygotes[key] = _Zygote(key, sock)
        self._watch(sock.fileno(), lambda: self._on_message(zygote))
        return zygote

    def _make(self, key: str, modules: Sequence[str], env: dict[str, str], sys_path: list[str]) -> _Zygote:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if key == _SEED:
            # The first seed was a fork of the agent before it had threads; a later one has to start from nothing.
            arguments = str(theirs.fileno()), str(os.getpid())
            interpreter.start("danaus.runtime.host.zygote", *arguments, pass_fds=[theirs.fileno()])
        else:
            seed = self._zygotes.get(_SEED) or self._make(_SEED, [], {}, sys_path)
            message = {"op": "zygote", "key": key, "modules": list(modules), "env": env, "sys_path": sys_path}
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                # If the seed has just died, the end of `theirs` tells the new zygote's end, and another is made.
                send(seed.sock, message, [theirs.fileno()])
        theirs.close()
        return self._add(key, ours)

    def _fork(
        self, zygote: _Zygote, common: dict[str, Any], procs: list[dict[str, Any]], outputs: list[tuple[int, int]]
    ) -> None:
        for proc, pair in zip(procs, outputs, strict=True):
            zygote.pending[proc["proc"]] = (common, proc, pair)
        step = max(1, min(_BATCH, _BATCH_BYTES // len(msgpack.packb(procs[0]) or b"0"))) if procs else 1
        try:
            for first in range(0, len(procs), step):
                fds = [fd for pair in outputs[first : first + step] for fd in pair]
                send(zygote.sock, {"op": "fork", **common, "procs": procs[first : first + step]}, fds)
        except (BrokenPipeError, ConnectionResetError):
            # It has just died: its socket is readable, and `_on_death` sees to what is pending.
            return
        except OSError as error:
            self._fail(zygote, f"asking the zygote for it failed ({error}); is its environment very large?", "")

    def _on_message(self, zygote: _Zygote) -> None:
        try:
            received = receive(zygote.sock)
        except OSError:
            received = None
        if received is None:
            self._on_death(zygote)
            return
        message, _ = received
        if "started" in message:
            zygote.is_second = False
            for proc, pid in message["started"]:
                self._take_started(zygote, proc, pid)
        elif "zygote" in message:
            made = self._zygotes.get(message["zygote"])
            if made is not None:
                made.pid = message["pid"]
        elif "failed" in message:
            self._fail(
                zygote, f"preloading {message['module']!r} failed; mend its import or leave it out", message["failed"]
            )
        elif "threaded" in message:
            self._unforkable.add(zygote.key)
            modules = ", ".join(self._modules[zygote.key])
            self._warn(
                f"preloading {modules} left {message['threaded']} threads running, so it cannot be forked safely; "
                "each process imports for itself, which is slower"
            )

    def _on_death(self, zygote: _Zygote) -> None:
        pending = list(zygote.pending.values())
        self._drop(zygote)
        if not pending:
            return
        if zygote.key in self._unforkable:
            seed = self._zygotes.get(_SEED) or self._make(_SEED, [], {}, [])
            common = {**pending[0][0], "imports": list(self._modules[zygote.key])}
            self._fork(seed, common, [proc for _, proc, _ in pending], [pair for _, _, pair in pending])
            return
        if not zygote.is_second:
            # It may have been killed before it read the request; what kills a second one is the request itself. What it
            # had begun is unknown, so it is undone.
            names = [name_of(zygote.key), *(proc["proc"] for _, proc, _ in pending)]
            end_children_named(names, but=self._started())
            second = self._make(zygote.key, *self._made_with[zygote.key])
            second.is_second = True
            for common, proc, pair in pending:
                self._fork(second, common, [proc], [pair])
            return
        self._fail(zygote, "the zygote ended while it was starting this process", "")

    def _fail(self, zygote: _Zygote, detail: str, traceback: str) -> None:
        pending, zygote.pending = zygote.pending, {}
        for _, _, pair in pending.values():
            _close(pair)
        self._on_failed(list(pending), detail, traceback)

    def _drop(self, zygote: _Zygote) -> None:
        self._unwatch(zygote.sock.fileno())
        zygote.sock.close()
        if self._zygotes.get(zygote.key) is zygote:
            del self._zygotes[zygote.key]


def _close(pair: tuple[int, int]) -> None:
    for fd in pair:
        os.close(fd)
