"""Settings from the environment: read here and nowhere else."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def socket_root() -> str:
    """Where a job's private socket directory is made. Unix socket paths are short: at most some 100 characters."""
    root = os.environ.get("DANAUS_SOCKET_DIR") or tempfile.gettempdir()
    return root if len(root) <= 48 else "/tmp"  # noqa: S108  a directory of mode 0700 is made inside


def log_root() -> Path:
    """Where per-rank log files are kept, one directory per job: ``DANAUS_LOG_DIR``, else the user's state directory."""
    chosen = os.environ.get("DANAUS_LOG_DIR")
    if chosen:
        return Path(chosen)
    state = os.environ.get("XDG_STATE_HOME")
    base = Path(state) if state else Path.home() / ".local" / "state"
    return base / "danaus" / "logs"


KEEP_LOG_DIRS = 20
"""Jobs whose log files are kept."""

GRACE_S = 4.0
"""Time a process has for its actors' cleanup, before SIGTERM."""

GRACE_AFTER_ERROR_S = 1.0
"""The same where the caller is on its way out with an exception, or is gone."""
