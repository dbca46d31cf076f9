"""Keeps a log file per rank on the host where the rank runs, readable by its user alone."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_log = logging.getLogger(__name__)


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
