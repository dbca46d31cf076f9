"""Removes what killed agents have left: where a controller or daemon dies with its agent, nobody else does."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Final

OWNER: Final = "agent.pid"
"""File in a job's directory that says which process it belongs to."""


def own(directory: str) -> None:
    """Note that a directory belongs to this process."""
    pid = os.getpid()
    with open(os.path.join(directory, OWNER), "x", encoding="ascii", opener=_private) as file:
        file.write(f"{pid} {_started(pid)}\n")


def sweep(root: str) -> None:
    """Remove what agents of this user have left in ``root`` that are not there any more."""
    for directory in Path(root).glob("danaus-*"):
        with contextlib.suppress(OSError, ValueError):
            if directory.stat().st_uid != os.geteuid():
                continue
            pid, started = (directory / OWNER).read_text(encoding="ascii").split()
            if _started(int(pid)) != started:
                shutil.rmtree(directory, ignore_errors=True)


def _started(pid: int) -> str:
    """When a process was started, in ticks since the boot; empty where there is none of that number."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    # A zombie holds nothing any more.
    return "" if fields[0] == "Z" else fields[19]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
