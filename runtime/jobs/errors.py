"""What goes wrong with jobs.

JobError
├── JobSpecError      another job runs under this name (also a ValueError)
├── LaunchError       hosts could not be started, or ended again; holds what was run and what it wrote
└── JobTimeoutError   not every host listened within the limit (also a TimeoutError)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from ..errors import DanausError

SHOWN_LINES: Final = 12
SHOWN_HOSTS: Final = 8


class JobError(DanausError):
    """A job could not do what was asked of it."""


class JobSpecError(JobError, ValueError):
    """A job that was asked for in another way runs under the same name.

    Attributes:
        name: Its name.
        differences: One line per field that differs.
    """

    def __init__(self, name: str, differences: tuple[str, ...]) -> None:
        super().__init__(name, differences)
        self.name, self.differences = name, differences

    def __str__(self) -> str:
        listing = "".join(f"\n  {line}" for line in self.differences)
        return (
            f"job {self.name!r} runs already, but not as asked for here:{listing}\n"
            f"choose another name (name=...), or end the one that runs: danaus job kill {self.name}"
        )


@dataclass(frozen=True, slots=True)
class Attempt:
    """One command that was run for a host, and what came of it."""

    host: str
    command: str
    """Empty for a host that ended by itself."""
    code: int | None
    """Its exit code; None if it did not end within its limit, or could not be run."""
    output: str
    """What it wrote, or why it could not be run."""

    def __str__(self) -> str:
        if not self.command:
            return f"{self.host}: {_indented(self.output, '    ').lstrip()}"
        ended = f"exit code {self.code}" if self.code is not None else "no exit code"
        text = _indented(self.output, "      ") or "      (it wrote nothing)"
        return f"{self.host}: {ended}\n    ran: {self.command}\n    its last lines:\n{text}"


class LaunchError(JobError):
    """Hosts of a job could not be started, or ended by themselves.

    Attributes:
        name: The job's name.
        attempts: What was run for each host that failed.
        advice: What to do about it.
    """

    def __init__(self, name: str, attempts: tuple[Attempt, ...], advice: str = "") -> None:
        super().__init__(name, attempts, advice)
        self.name, self.attempts, self.advice = name, attempts, advice

    def __str__(self) -> str:
        shown = [f"\n  {attempt}" for attempt in self.attempts[:SHOWN_HOSTS]]
        rest = len(self.attempts) - len(shown)
        more = f"\n  and {rest} more" if rest > 0 else ""
        advice = f"\n{self.advice}" if self.advice else ""
        return f"job {self.name!r}: {len(self.attempts)} of its hosts failed{''.join(shown)}{more}{advice}"


class JobTimeoutError(JobError, TimeoutError):
    """Not every host of a job listened within the limit.

    Attributes:
        name: The job's name.
        timeout_s: The limit.
        missing: What is known of each host that did not listen.
        detail: What the scheduler says.
    """

    def __init__(self, name: str, timeout_s: float, missing: tuple[str, ...], detail: str = "") -> None:
        super().__init__(name, timeout_s, missing, detail)
        self.name, self.timeout_s, self.missing, self.detail = name, timeout_s, missing, detail

    def __reduce__(self) -> tuple[Any, ...]:
        # TimeoutError is an OSError, which keeps two arguments only.
        return JobTimeoutError, (self.name, self.timeout_s, self.missing, self.detail), self.__dict__

    def __str__(self) -> str:
        shown = ", ".join(self.missing[:SHOWN_HOSTS])
        more = f" and {len(self.missing) - SHOWN_HOSTS} more" if len(self.missing) > SHOWN_HOSTS else ""
        detail = f" ({self.detail})" if self.detail else ""
        return (
            f"job {self.name!r}: {len(self.missing)} hosts do not listen after {self.timeout_s:g} s{detail}: "
            f"{shown}{more}; the job goes on: call hosts() again to wait longer, or end it with kill() or "
            f"danaus job kill {self.name}"
        )


def _indented(text: str, indent: str) -> str:
    """The last lines of ``text``."""
    return "\n".join(f"{indent}{line}" for line in text.strip().splitlines()[-SHOWN_LINES:])
