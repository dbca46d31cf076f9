"""Actors that `danaus job exec`, `shell` and `logs` put on a job's hosts.

What they have to say travels through ports, as it comes; what they return is the exit code.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

from ..actor import Actor, concurrent_endpoint
from ..config import log_root

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..calls.port import Port

MESH: Final = "danaus-job"
"""Name of the processes that these actors live in; their own log files are no user's."""

WINDOW: Final = 64
"""How many pieces may be under way to who shows them: a command that writes faster waits, as on a terminal."""

_CHUNK_BYTES: Final = 64 << 10
_FOLLOW_S: Final = 0.25
# Becomes the command: with signals as a login has them, since an actor's process ignores and blocks some, and with the
# terminal at its input, if it is one, which a session's first process has to ask for itself.
_LAUNCHER: Final = """
import fcntl, os, signal, sys, termios
signal.pthread_sigmask(signal.SIG_SETMASK, [])
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    try:
        signal.signal(number, signal.SIG_DFL)
    except OSError:
        pass
if os.isatty(0):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
try:
    os.execvp(sys.argv[1], sys.argv[1:])
except OSError as error:
    print(f"{sys.argv[1]}: {error.strerror}", file=sys.stderr, flush=True)
    os._exit(127 if isinstance(error, FileNotFoundError) else 126)
"""


class Text(NamedTuple):
    """A piece of what a command wrote; of a log file, whole lines."""

    host: int
    source: str
    """``out`` or ``err``, or the name of a log file; nothing where this host has said all."""
    data: bytes = b""


class _Runner(Actor):
    """Has a command that runs, and can be told to end it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._room = threading.Semaphore(WINDOW)

    def _send(self, port: Port[Any], piece: object) -> None:
        """Send a piece as soon as there is room (a thread of its own)."""
        self._room.acquire()
        port.send(piece)

    @concurrent_endpoint
    async def more(self, count: int) -> None:
        """Take note that ``count`` pieces have been shown."""
        self._room.release(count)

    @concurrent_endpoint
    async def end(self) -> None:
        """End the command as a closed terminal would, with what it started."""
        # Nobody shows anything any more.
        self._room.release(1 << 20)
        if self._child is not None and self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGHUP)


class Commands(_Runner):
    """Runs a command on its host."""

    @concurrent_endpoint
    async def run(self, command: Sequence[str], host: int, port: Port[Any]) -> int:
        """Run a command until it ends; return its exit code, as a shell would.

        Args:
            command: Program and arguments.
            host: Number of this host in its job.
            port: Gets every :class:`Text`; :meth:`more` makes room for further ones.
        """
        env = {**os.environ, "DANAUS_HOST_INDEX": str(host)}
        pipe = subprocess.PIPE
        child = self._child = _launch(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=env)
        assert child.stdout is not None
        assert child.stderr is not None
        await asyncio.gather(
            asyncio.to_thread(self._pump, child.stdout, Text(host, "out"), port),
            asyncio.to_thread(self._pump, child.stderr, Text(host, "err"), port),
        )
        code = await asyncio.to_thread(child.wait)
        port.send(Text(host, ""))
        return code if code >= 0 else 128 - code

    def _pump(self, pipe: IO[bytes], like: Text, port: Port[Any]) -> None:
        with pipe:
            while data := pipe.read1(_CHUNK_BYTES):  # type: ignore[attr-defined]
                self._send(port, like._replace(data=data))


def _launch(
    command: Sequence[str], *, stdin: int, stdout: int, stderr: int, env: dict[str, str]
) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-IS", "-c", _LAUNCHER, *command]
    return subprocess.Popen(  # noqa: S603  what the user typed
        words, stdin=stdin, stdout=stdout, stderr=stderr, env=env, start_new_session=True
    )


class Terminal(_Runner):
    """Runs one command in a terminal of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._master = -1
        self._writing = asyncio.Lock()

    @concurrent_endpoint
    async def run(self, command: Sequence[str], size: tuple[int, int], term: str, port: Port[Any]) -> int:
        """Run a command until it ends; return its exit code, as a shell would.

        Args:
            command: Program and arguments; none for the user's shell.
            size: Rows and columns.
            term: What kind of terminal it is shown on.
            port: Gets what it writes, in pieces, and then None; :meth:`more` makes room for further ones.
        """
        words = list(command) or [os.environ.get("SHELL") or "/bin/sh", "-l"]
        child = self._child = self._start(words, size, term)
        code = await asyncio.to_thread(self._serve, child, port)
        return code if code >= 0 else 128 - code

    def _start(self, words: Sequence[str], size: tuple[int, int], term: str) -> subprocess.Popen[bytes]:
        self._master, slave = pty.openpty()
        try:
            _set_size(self._master, size)
            return _launch(words, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": term})
        finally:
            os.close(slave)

    def _serve(self, child: subprocess.Popen[bytes], port: Port[Any]) -> int:
        # Linux says EIO once nobody has the other end open.
        with contextlib.suppress(OSError):
            while data := os.read(self._master, _CHUNK_BYTES):
                self._send(port, data)
        code = child.wait()
        port.send(None)
        master, self._master = self._master, -1
        os.close(master)
        return code

    @concurrent_endpoint
    async def write(self, data: bytes) -> None:
        """Give the command what was typed."""
        # A terminal takes some KiB until its program reads: what is typed meanwhile comes after it.
        async with self._writing:
            while data and self._master >= 0:
                written = await asyncio.to_thread(os.write, self._master, data)
                data = data[written:]

    @concurrent_endpoint
    async def resize(self, size: tuple[int, int]) -> None:
        """Tell the command that its terminal has another size, rows and columns."""
        if self._master >= 0:
            _set_size(self._master, size)


def _set_size(descriptor: int, size: tuple[int, int]) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))


class Logs(Actor):
    """Reads the log files of the ranks on its host."""

    def __init__(self) -> None:
        self._is_ending = False

    @concurrent_endpoint
    async def end(self) -> None:
        """Stop following."""
        self._is_ending = True

    @concurrent_endpoint
    async def read(self, host: int, name: str, lines: int, follow: bool, port: Port[Any]) -> str:
        """Send the last lines of each rank of the newest run; return the folder that they are in, "" if there is none.

        Args:
            host: Number of this host in its job.
            name: Name of this host, by which its files are kept.
            lines: How many of each file, at most.
            follow: Go on with what is written later, until :meth:`end`.
            port: Gets every :class:`Text`.
        """
        offsets: dict[Path, int] = {}
        is_first = True
        while True:
            # Another run may have begun meanwhile, while those before it still write.
            folder = newest_run(Path(log_root()), name)
            for path in sorted({*offsets, *(_log_files(folder) if folder is not None else ())}):
                # A file that is new since the last look is new as a whole.
                offset = offsets.get(path, None if is_first else 0)
                # Runs long past are removed.
                with contextlib.suppress(FileNotFoundError):
                    data, offsets[path] = _news(path, offset, lines)
                    if data:
                        port.send(Text(host, path.stem, data))
            if not follow or self._is_ending:
                port.send(Text(host, ""))
                return str(folder or "")
            is_first = False
            await asyncio.sleep(_FOLLOW_S)


def newest_run(root: Path, host: str) -> Path | None:
    """Return the folder of the newest run that has files of ranks on this host.

    Args:
        root: Where all log files are.
        host: Name of the host.
    """
    base = root / re.sub(r"[^A-Za-z0-9_.-]+", "_", host)
    runs = [path for path in base.iterdir() if path.is_dir()] if base.is_dir() else []
    dated = [(_written_s(files), run) for run in runs if (files := _log_files(run))]
    return max(dated)[1] if dated else None


def _written_s(files: Iterable[Path]) -> float:
    """Return when the newest of ``files`` was written; they may be removed meanwhile."""
    times = [0.0]
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)


def _log_files(folder: Path) -> list[Path]:
    found: Iterable[Path] = sorted(folder.glob("*.log"))
    return [path for path in found if not path.name.startswith(f"{MESH}-")]


def _news(path: Path, offset: int | None, lines: int) -> tuple[bytes, int]:
    """Return the whole lines after ``offset``, or the last ``lines`` ones, and where they end."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = max(0, size - 256 * max(lines, 1) - _CHUNK_BYTES) if offset is None else offset
        file.seek(start)
        data = file.read(size - start if offset is None else 16 * _CHUNK_BYTES)
    end = data.rfind(b"\n") + 1
    news = data[:end]
    if offset is None:
        news = b"".join(news.splitlines(keepends=True)[-lines:]) if lines else b""
    return news, start + end
