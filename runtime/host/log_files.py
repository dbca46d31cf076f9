"""Keeps a log file per rank on the host where the rank runs, readable by its user alone."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

from ..config import KEEP_LOG_DIRS, log_root

_log = logging.getLogger(__name__)


def new_log_directory(root: str, host: str = "") -> str:
    """Make the directory of one job's files, and remove those of jobs long past.

    Args:
        root: Where; empty for the default.
        host: Name of the host, where several may keep theirs in one place.
    """
    base = Path(root) if root else log_root()
    if host:
        base /= re.sub(r"[^A-Za-z0-9_.-]+", "_", host)
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = tempfile.mkdtemp(prefix=f"{stamp}-{os.getpid()}-", dir=base)
    _remove_old(base)
    return path


def _remove_old(base: Path) -> None:
    """Remove the oldest directories; those in which nothing was written do not count."""
    jobs = sorted((entry for entry in base.iterdir() if _STAMP.match(entry.name)), key=_age)
    written = [entry for entry in jobs if _holds_files(entry)]
    for old in written[:-KEEP_LOG_DIRS]:
        shutil.rmtree(old, ignore_errors=True)
    for empty in [entry for entry in jobs[:-KEEP_LOG_DIRS] if entry not in written]:
        # Refused where something has been written meanwhile.
        with contextlib.suppress(OSError):
            empty.rmdir()


def _holds_files(entry: Path) -> bool:
    try:
        return any(entry.iterdir())
    except OSError:
        return False


def _age(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except OSError:
        # Another job is removing it.
        return 0.0


_STAMP = re.compile(r"[0-9]{8}-[0-9]{6}-")


class LogFiles:
    """Appends lines to ``<directory>/<name>.log``; each call is one write, nothing is buffered.

    A file that cannot be written (a full disk) must not end the host agent: its lines are dropped from then on, with
    one warning. Not for several threads at once.

    Args:
        directory: created with mode 0700 where it does not exist.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._descriptors: dict[str, int] = {}
        self._failed: set[str] = set()

    def path(self, name: str) -> Path:
        """Return where the lines of ``name`` go; characters that a file name should not have become ``_``."""
        safe = re.sub(r"[^\w.+=@-]", "_", name).lstrip(".") or "_"
        return self.directory / f"{safe}.log"

    def write(self, name: str, lines: Sequence[str]) -> None:
        """Append lines to the file of ``name``."""
        if not lines or name in self._failed:
            return
        data = ("\n".join(lines) + "\n").encode(errors="replace")
        try:
            descriptor = self._descriptor(name)
            while data:
                data = data[os.write(descriptor, data) :]
        except OSError as error:
            self._failed.add(name)
            _log.warning("%s: %s; lines of %s are no longer kept on this host", self.path(name), error, name)

    def close(self, name: str | None = None) -> None:
        """Close one file, or all of them; a later write opens it again."""
        for key in list(self._descriptors) if name is None else [name]:
            descriptor = self._descriptors.pop(key, None)
            if descriptor is not None:
                os.close(descriptor)

    def _descriptor(self, name: str) -> int:
        if name not in self._descriptors:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptors[name] = os.open(self.path(name), flags, 0o600)
        return self._descriptors[name]
