"""Shows how far a sync is, where somebody looks at a terminal and it takes long enough to wonder."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

QUIET_S: Final = 1.0
"""What takes no longer is not worth a bar."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a sync is.

    Attributes:
        bytes_sent: What was sent so far.
        bytes_total: What is to be sent.
        files: Contents that are sent.
        hosts: Hosts that are not up to date.
    """

    bytes_sent: int
    bytes_total: int
    files: int
    hosts: int


@contextlib.contextmanager
def show_progress(on_progress: Callable[[Progress], object] | None) -> Generator[Callable[[Progress], object]]:
    """Give what is to be told of progress: the caller's function, a bar on a terminal, or nothing."""
    if on_progress is not None:
        yield on_progress
        return
    if not sys.stderr.isatty():
        yield _ignore
        return
    bar = _Bar()
    try:
        yield bar.tell
    finally:
        bar.close()


def _ignore(_progress: Progress) -> None:
    return


class _Bar:
    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._shown: Any = None
        self._task: Any = None

    def tell(self, progress: Progress) -> None:
        if self._shown is None and time.monotonic() - self._started_s < QUIET_S:
            return
        shown = self._shown or self._show()
        if shown is None:
            return
        what = f"{progress.files} files to {progress.hosts} hosts"
        shown.update(self._task, description=what, completed=progress.bytes_sent, total=progress.bytes_total)

    def _show(self) -> Any:
        try:
            from rich import progress as rich
            from rich.console import Console
        except ImportError:
            self._started_s = float("inf")
            return None
        self._shown = rich.Progress(
            rich.TextColumn("danaus: {task.description}"),
            rich.BarColumn(),
            rich.DownloadColumn(binary_units=True),
            rich.TransferSpeedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._shown.add_task("sync")
        self._shown.start()
        return self._shown

    def close(self) -> None:
        if self._shown is not None:
            self._shown.stop()
