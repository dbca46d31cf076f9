"""How `danaus job` shows jobs: tables, and a line while something is waited for."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..runtime.jobs import JobState

HEADINGS: Final = ("host", "status", "address", "name", "detail")
COLOURS: Final = {"running": "green", "pending": "yellow", "ended": "red"}


def show_state(state: JobState) -> None:
    """Print a job and its hosts: coloured on a terminal where rich is installed, else plain."""
    counts = f"{sum(host.status == 'running' for host in state.hosts)} of {len(state.hosts)} hosts listen"
    detail = f" ({state.detail})" if state.detail else ""
    print(f"job {state.name}, {state.kind}: {state.status}{f', {counts}' if state.hosts else ''}{detail}")
    if state.hosts:
        show_table(HEADINGS, [_row(state, index) for index in range(len(state.hosts))])


def _row(state: JobState, index: int) -> list[str]:
    host = state.hosts[index]
    return [str(host.index), host.status, host.address or "-", host.name, host.detail]


def show_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose second column is a status."""
    if sys.stdout.isatty() and _show_rich(headings, rows):
        return
    # A table of one line each, which other programs can read.
    flat = [[" ".join(cell.split()) for cell in row] for row in (headings, *rows)]
    widths = [max(len(row[column]) for row in flat) for column in range(len(headings))]
    for row in flat:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _show_rich(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(*headings, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        cells = [Text(cell) for cell in row]
        cells[1].stylize(COLOURS.get(row[1], ""))
        table.add_row(*cells)
    Console().print(table)
    return True


def as_json(state: JobState) -> str:
    """Return a job's state for other programs."""
    return json.dumps(asdict(state), indent=1)


class Waiting:
    """One line on stderr that says how far something is; on no terminal, a line whenever it changes."""

    def __init__(self, what: str) -> None:
        self._what, self._since_s = what, time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._last = ""

    def show(self, text: str) -> None:
        """Say how far it is now."""
        if self._is_terminal:
            print(f"\r\x1b[K{self._what}: {text} ({time.monotonic() - self._since_s:.0f} s)", end="", file=sys.stderr)
            sys.stderr.flush()
        elif text != self._last:
            print(f"{self._what}: {text}", file=sys.stderr)
        self._last = text

    def end(self) -> None:
        """Leave the line."""
        if self._is_terminal and self._last:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
