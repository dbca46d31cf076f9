"""Turns what the processes of a mesh write into lines for a person at a terminal.

Pure: bytes and text in, text out, time as an argument. On each host a :class:`LineSplitter` per pipe makes lines and a
:class:`Tail` per rank keeps the last ones; at the controller one :class:`Aggregator` joins equal lines of many ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

Stream = Literal["stdout", "stderr"]

# Long enough for ranks that do the same thing, too short for a person to notice.
DEFAULT_WINDOW_S = 0.2
_NEWLINE = b"\n"


class LineSplitter:
    """Cuts the bytes of one pipe into lines, without their ends.

    Invalid UTF-8 becomes U+FFFD. A line longer than ``max_line_bytes`` comes in pieces, so that a process that never
    ends its line is shown as well, and costs no memory.
    """

    def __init__(self, *, max_line_bytes: int = 64 << 10) -> None:
        if max_line_bytes < 4:
            raise ValueError(f"max_line_bytes={max_line_bytes}: at least 4, the length of one character")
        self._max_line_bytes = max_line_bytes
        self._rest = b""

    @property
    def pending(self) -> str:
        """What was written of a line that has not ended: a prompt, or where the process got stuck."""
        return self._rest.decode(errors="replace")

    def feed(self, chunk: bytes) -> list[str]:
        """Return the lines that ``chunk`` completes."""
        data = self._rest + chunk
        complete, newline, self._rest = data.rpartition(_NEWLINE)
        lines = self._decode(complete) if newline else []
        while len(self._rest) > self._max_line_bytes:
            piece, self._rest = self._cut(self._rest)
            lines.append(piece.decode(errors="replace"))
        return lines

    def close(self) -> list[str]:
        """Return the unfinished line, if there is one; the pipe has ended."""
        rest, self._rest = self._rest, b""
        return [rest.decode(errors="replace").removesuffix("\r")] if rest else []

    def _decode(self, complete: bytes) -> list[str]:
        raws = complete.split(_NEWLINE)
        if max(map(len, raws)) <= self._max_line_bytes:
            # One decode for all lines is several times faster than one for each.
            text = complete.decode(errors="replace")
            return (text.replace("\r\n", "\n").removesuffix("\r") if "\r" in text else text).split("\n")
        lines = list[str]()
        for raw in raws:
            line = raw
            while len(line) > self._max_line_bytes:
                piece, line = self._cut(line)
                lines.append(piece.decode(errors="replace"))
            lines.append(line.decode(errors="replace").removesuffix("\r"))
        return lines

    def _cut(self, line: bytes) -> tuple[bytes, bytes]:
        """Cut at the limit, or up to three bytes before it where it falls inside a character."""
        at = self._max_line_bytes
        boundary = next((end for end in range(at, at - 4, -1) if line[end] & 0xC0 != 0x80), at)
        return line[:boundary], line[boundary:]


class Tail:
    """The last lines that a rank wrote, for the report of its death."""

    def __init__(self, *, max_lines: int = 20, max_chars: int = 1000) -> None:
        self._lines: deque[str] = deque(maxlen=max_lines)
        self._max_chars = max_chars

    def add(self, lines: Iterable[str]) -> None:
        """Append lines; each is kept up to ``max_chars``."""
        self._lines.extend(_shorten(_visible(line), self._max_chars) for line in lines)

    def lines(self) -> list[str]:
        """Return the last lines, oldest first."""
        return list(self._lines)


@dataclass(frozen=True, slots=True)
class LogOutput:
    """One line to print, which all of ``ranks`` wrote."""

    mesh: str
    ranks: tuple[int, ...]
    stream: Stream
    line: str

    def __str__(self) -> str:
        """Show as ``[trainers 0-3,6] loading (x5)``."""
        count = f" (x{len(self.ranks)})" if len(self.ranks) > 1 else ""
        return f"[{self.mesh} {format_ranks(self.ranks)}] {self.line}{count}"


class Aggregator:
    """Joins equal lines of different ranks of a mesh; loses none, and keeps each rank's lines in its order.

    A line waits up to ``window_s`` for the same line of other ranks, or until every rank has written it where the size
    of the mesh is known. A rank joins a waiting line only if that stands after everything it wrote before; so two
    ranks that write the same lines in different orders are shown one after the other. Repetitions by one rank stay.

    Args:
        window_s: how long a line waits; None prints every line by itself, at once.
        max_pending: lines that may wait; beyond it the oldest are due at once.
    """

    def __init__(self, *, window_s: float | None = DEFAULT_WINDOW_S, max_pending: int = 10_000) -> None:
        self.set_window(window_s)
        self._max_pending = max_pending
        self._sizes: dict[str, int] = {}
        # Waiting lines by their number; numbers grow, and the oldest is always the first out.
        self._waiting: dict[int, _Waiting] = {}
        self._first = self._next = 0
        self._numbers: dict[tuple[str, Stream, str], list[int]] = {}
        # The number of the line that each rank wrote last.
        self._last: dict[tuple[str, int], int] = {}

    def set_window(self, window_s: float | None) -> None:
        """Change the window from now on, for waiting lines too."""
        if window_s is not None and window_s < 0:
            raise ValueError(f"window_s={window_s}: give seconds, or None to print every line by itself")
        self._window_s = window_s

    def set_size(self, mesh: str, num_ranks: int) -> None:
        """Note how many ranks a mesh has: a line that all of them wrote waits no longer."""
        self._sizes[mesh] = num_ranks

    def forget(self, mesh: str) -> None:
        """Drop what is known of a mesh that has ended; its waiting lines still come out."""
        self._sizes.pop(mesh, None)
        for key in [key for key in self._last if key[0] == mesh]:
            del self._last[key]

    def add(self, mesh: str, rank: int, stream: Stream, lines: Iterable[str], *, now_s: float) -> None:
        """Take lines that a rank wrote, in its order."""
        last = self._last.get((mesh, rank), -1)
        for line in lines:
            text = _visible(line)
            numbers = self._numbers.setdefault((mesh, stream, text), [])
            at = bisect_right(numbers, last) if self._window_s is not None else len(numbers)
            if at < len(numbers):
                last = numbers[at]
                self._waiting[last].ranks.append(rank)
                continue
            last, self._next = self._next, self._next + 1
            numbers.append(last)
            self._waiting[last] = _Waiting(mesh, stream, text, now_s, [rank])
        self._last[mesh, rank] = last

    def due(self, *, now_s: float) -> list[LogOutput]:
        """Return the lines whose time has come, in order. Print all of them, and call again at :attr:`next_due_s`."""
        printed = list[LogOutput]()
        while self._waiting and self._is_due(self._waiting[self._first], now_s):
            printed.append(self._pop())
        return printed

    def flush(self) -> list[LogOutput]:
        """Return everything that waits, in order: the end, or somebody wants to see it now."""
        return [self._pop() for _ in range(len(self._waiting))]

    @property
    def next_due_s(self) -> float | None:
        """When :meth:`due` will have something even if nothing more arrives; None where nothing waits."""
        if not self._waiting:
            return None
        return self._waiting[self._first].since_s + (self._window_s or 0.0)

    def _is_due(self, waiting: _Waiting, now_s: float) -> bool:
        return (
            self._window_s is None
            or now_s >= waiting.since_s + self._window_s
            or len(waiting.ranks) == self._sizes.get(waiting.mesh)
            or len(self._waiting) > self._max_pending
        )

    def _pop(self) -> LogOutput:
        waiting = self._waiting.pop(self._first)
        key = (waiting.mesh, waiting.stream, waiting.text)
        numbers = self._numbers[key]
        numbers.remove(self._first)
        if not numbers:
            del self._numbers[key]
        self._first += 1
        return LogOutput(waiting.mesh, tuple(sorted(waiting.ranks)), waiting.stream, waiting.text)


def format_ranks(ranks: Iterable[int], *, max_chars: int = 40) -> str:
    """Write ranks as runs, ``0-3,6``; where that is too long, as its beginning and its last run."""
    runs = list[list[int]]()
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    whole = ",".join(texts)
    if len(whole) <= max_chars:
        return whole
    room = max_chars - len(texts[-1]) - len(",...,")
    return f"{whole[: max(room, 1)].rpartition(',')[0] or texts[0]},...,{texts[-1]}"


@dataclass(slots=True)
class _Waiting:
    mesh: str
    stream: Stream
    text: str
    since_s: float
    ranks: list[int]


def _visible(line: str) -> str:
    """Return what a terminal would still show: a progress bar rewrites its line after each carriage return."""
    return line.rstrip("\r").rpartition("\r")[2] if "\r" in line else line


def _shorten(line: str, max_chars: int) -> str:
    return line if len(line) <= max_chars else f"{line[:max_chars]}... ({len(line) - max_chars} more characters)"
