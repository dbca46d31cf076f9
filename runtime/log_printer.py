"""Prints what processes wrote, on the controller's terminal, from a thread of its own: a terminal may block."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from typing import Any

from .host.logs import Aggregator, LogOutput


class LogPrinter:
    """Takes lines from the I/O thread; joins equal ones of several ranks; prints them with mesh and rank."""

    def __init__(self) -> None:
        self._aggregator = Aggregator()
        self._queue: deque[tuple[str, int, str, list[str]]] = deque()
        self._muted: set[str] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def on_log(self, fields: dict[str, Any]) -> None:
        """Take lines of one rank (I/O thread)."""
        if fields["mesh"] not in self._muted:
            self._put((fields["name"], fields["rank"], fields["stream"], fields["lines"]))

    def note(self, text: str) -> None:
        """Print a line of the runtime's own."""
        self._put(("", -1, "stderr", text.splitlines()))

    def on_option(self, fields: dict[str, Any]) -> None:
        """Mute or unmute a mesh; set the window for all meshes (I/O thread)."""
        with self._changed:
            (self._muted.discard if fields["stream"] else self._muted.add)(fields["mesh"])
            self._aggregator.set_window(fields["window_s"])
            self._changed.notify_all()

    def close(self) -> None:
        """Print everything that waits and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(2.0)

    def _put(self, item: tuple[str, int, str, list[str]]) -> None:
        with self._changed:
            self._queue.append(item)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="danaus-logs", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                due_s = self._aggregator.next_due_s
                if not self._queue and not self._closed:
                    self._changed.wait(None if due_s is None else max(0.0, due_s - time.monotonic()))
                lines = self._take()
                closed = self._closed and not self._queue
            for line in lines:
                _print(line)
            if closed:
                return

    def _take(self) -> list[LogOutput | str]:
        printed: list[LogOutput | str] = []
        while self._queue:
            name, rank, stream, lines = self._queue.popleft()
            if rank < 0:
                printed += [*self._aggregator.flush(), *lines]
            else:
                self._aggregator.add(name, rank, stream, lines, now_s=time.monotonic())  # type: ignore[arg-type]
        printed += self._aggregator.flush() if self._closed else self._aggregator.due(now_s=time.monotonic())
        return printed


def _print(line: LogOutput | str) -> None:
    file = sys.stdout if isinstance(line, LogOutput) and line.stream == "stdout" else sys.stderr
    try:
        print(line, file=file, flush=True)
    except (OSError, ValueError, AttributeError):
        # The terminal is gone, or the interpreter is closing it: the files on the hosts have every line.
        return
