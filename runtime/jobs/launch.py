"""Runs what starts hosts: the command of a daemon, the tools of schedulers, and what to show of them when they fail."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .errors import Attempt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HOST_MODULE: Final = "danaus.tools.host"
"""What `danaus host` is, for a Python whose scripts may not be on the search path."""

_TAIL_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Output:
    """What came of a command."""

    command: str
    """As a shell would take it; it holds no secret, since those go through its input."""
    code: int | None
    """None if it could not be run or did not end within its limit."""
    out: str
    err: str
    """What it wrote there, or why it has no exit code."""

    def attempt(self, host: str) -> Attempt:
        """Return it as a part of an error about ``host``."""
        return Attempt(host, self.command, self.code, self.err if self.err.strip() else self.out)


def run_tool(
    command: Sequence[str], *, timeout_s: float, stdin: bytes = b"", env: Mapping[str, str] | None = None
) -> Output:
    """Run a scheduler's tool; never raises for what it does.

    Args:
        command: Program and arguments.
        timeout_s: After which it is killed.
        stdin: What it reads.
        env: Its whole environment; by default that of this process.
    """
    text = shlex.join(command)
    try:
        done = subprocess.run(  # noqa: S603  the user's own scheduler
            list(command), input=stdin, capture_output=True, timeout=timeout_s, env=env, check=False
        )
    except FileNotFoundError:
        return Output(text, None, "", f"no program {command[0]!r} is on the search path of this machine")
    except OSError as error:
        return Output(text, None, "", f"{command[0]} could not be run: {error}")
    except subprocess.TimeoutExpired as error:
        wrote = (error.stderr or b"").decode(errors="replace")
        return Output(text, None, "", f"{wrote}it did not end within {timeout_s:g} s and was killed")
    return Output(text, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def host_arguments(
    *, listen: str, key: str, name: str, ready_file: str, advertise: str = "", follow: int | None = None
) -> list[str]:
    """Return the command line of a daemon after its interpreter; it ends with process ``follow``."""
    optional = ["--advertise", advertise] if advertise else []
    optional += ["--follow", str(follow)] if follow is not None else []
    required = ["--listen", listen, "--key", key, "--name", name, "--ready-file", ready_file]
    return ["-m", HOST_MODULE, *required, *optional]


def read_ready(path: str | os.PathLike[str]) -> str:
    """Return the address that a daemon wrote when it listened, "" before."""
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8").strip()
    return ""


def tail(path: str | os.PathLike[str], lines: int) -> str:
    """Return the last lines of a file, "" if there is none."""
    try:
        with Path(path).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
