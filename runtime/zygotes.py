"""The agent's side of its zygotes: one per set of preloaded modules, each forked from the seed at first use."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final, Protocol

from .kernel import end_children
from .zygote import receive, send

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_BATCH: Final = 60
_SEED: Final = "plain"


class _OnFailed(Protocol):
    def __call__(self, procs: Iterable[str], detail: str, traceback: str) -> None: ...


class _Zygote:
    def __init__(self, key: str, sock: socket.socket) -> None:
        self.key, self.sock = key, sock
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
        on_failed: _OnFailed,
        warn: Callable[[str], None],
    ) -> None:
        self._watch, self._unwatch = watch, unwatch
        self._on_started, self._on_failed, self._warn = on_started, on_failed, warn
        self._zygotes: dict[str, _Zygote] = {}
        self._unforkable: set[str] = set()
        self._modules: dict[str, Sequence[str]] = {}
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
        if key in self._unforkable:
            key = _SEED
        zygote = self._zygotes.get(key) or self._make(key, modules, env, sys_path)
        imports = [] if zygote.key != _SEED else list(modules)
        self._fork(zygote, {**common, "imports": imports}, procs, outputs)

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
            code = "from danaus.runtime.zygote import main; main()"
            command = [sys.executable, "-c", code, str(theirs.fileno()), str(os.getpid())]
            subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)  # noqa: S603  our own interpreter and module
        else:
            seed = self._zygotes.get(_SEED) or self._make(_SEED, [], {}, sys_path)
            message = {"op": "zygote", "key": key, "modules": list(modules), "env": env, "sys_path": sys_path}
            send(seed.sock, message, [theirs.fileno()])
        theirs.close()
        return self._add(key, ours)

    def _fork(
        self, zygote: _Zygote, common: dict[str, Any], procs: list[dict[str, Any]], outputs: list[tuple[int, int]]
    ) -> None:
        for first in range(0, len(procs), _BATCH):
            batch, fds = procs[first : first + _BATCH], outputs[first : first + _BATCH]
            for proc, pair in zip(batch, fds, strict=True):
                zygote.pending[proc["proc"]] = (common, proc, pair)
            send(zygote.sock, {"op": "fork", **common, "procs": batch}, [fd for pair in fds for fd in pair])

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
            for proc, pid in message["started"]:
                _close(zygote.pending.pop(proc)[2])
                self._on_started(proc, pid)
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
        zygote.pending = {proc["proc"]: (common, proc, pair) for common, proc, pair in pending}
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
