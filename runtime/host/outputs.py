"""What processes write: read from their pipes, kept in files, handed on in lines; the last ones remembered."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from .logs import LineSplitter, Tail

if TYPE_CHECKING:
    from collections.abc import Callable

    from .log_files import LogFiles

_READ_BYTES: Final = 1 << 16


class _Output:
    """One proc's stdout or stderr."""

    def __init__(self, proc: str, stream: str, fd: int, tail: Tail) -> None:
        self.proc, self.stream, self.fd, self.tail = proc, stream, fd, tail
        self.splitter = LineSplitter()


class Outputs:
    """The pipes of all processes.

    Args:
        files: Where every line is kept.
        hand_on: Takes (proc, stream, lines).
        watch: Has a handler called when a descriptor is readable.
        unwatch: Ends that.
    """

    def __init__(
        self,
        files: LogFiles,
        hand_on: Callable[[str, str, list[str]], None],
        *,
        watch: Callable[[int, Callable[[], object]], None],
        unwatch: Callable[[int], None],
    ) -> None:
        self._files, self._hand_on, self._watch, self._unwatch = files, hand_on, watch, unwatch
        self._outputs: dict[str, list[_Output]] = {}

    def open(self, proc: str) -> tuple[int, int]:
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

    def rename(self, old: str, new: str) -> None:
        """What ``old`` writes from now on is ``new``'s."""
        self._outputs[new] = self._outputs.pop(old)
        for output in self._outputs[new]:
            output.proc = new

    def last_lines(self, proc: str) -> list[str]:
        """The last lines that a proc has written."""
        outputs = self._outputs.get(proc)
        return outputs[0].tail.lines() if outputs else []

    def close(self, proc: str) -> list[str]:
        """Drain and close a proc's pipes; return the last lines that it wrote."""
        outputs = self._outputs.pop(proc, [])
        for output in outputs:
            while self._read(output):
                pass
            self._on_lines(output, output.splitter.close())
            self._unwatch(output.fd)
            os.close(output.fd)
        self._files.close(proc)
        return outputs[0].tail.lines() if outputs else []

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
        if lines:
            output.tail.add(lines)
            self._files.write(output.proc, lines)
            self._hand_on(output.proc, output.stream, lines)
