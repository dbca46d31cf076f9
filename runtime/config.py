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


def state_root() -> Path:
    """The user's directory for what outlives a job's processes: ``DANAUS_STATE_DIR``, else in the state directory."""
    chosen = os.environ.get("DANAUS_STATE_DIR")
    if chosen:
        return Path(chosen)
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "danaus"


def stuck_s() -> float:
    """Within how many seconds a process that does not answer is told of: ``DANAUS_STUCK_S``, 2 by default, 0 for never.

    Raises:
        ValueError: It is no such number.
    """
    text = os.environ.get("DANAUS_STUCK_S", "").strip() or "2"
    try:
        limit_s = float(text)
    except ValueError:
        limit_s = -1.0
    if limit_s != 0 and not MIN_STUCK_S <= limit_s < float("inf"):
        raise ValueError(f"DANAUS_STUCK_S={text}: expected seconds, at least {MIN_STUCK_S:g}, or 0 for no watching")
    return limit_s


def py_spy() -> str | None:
    """What to run for py-spy, ``DANAUS_PY_SPY``; empty for nothing, None where it is to be looked for."""
    return os.environ.get("DANAUS_PY_SPY")


def preempt_s() -> float:
    """How many seconds actors have to drain once their host was told to end: ``DANAUS_PREEMPT_S``, 10 by default.

    Raises:
        ValueError: It is no such number.
    """
    text = os.environ.get("DANAUS_PREEMPT_S", "").strip() or "10"
    try:
        limit_s = float(text)
    except ValueError:
        limit_s = -1.0
    if not 0 <= limit_s < float("inf"):
        raise ValueError(f"DANAUS_PREEMPT_S={text}: expected seconds, 0 or more")
    return limit_s


def grace_s() -> float:
    """How many seconds a host may be unreachable before it is lost: ``DANAUS_GRACE_S``, 10 by default.

    Raises:
        ValueError: It is no such number.
    """
    text = os.environ.get("DANAUS_GRACE_S", "").strip() or "10"
    try:
        limit_s = float(text)
    except ValueError:
        limit_s = -1.0
    if not MIN_HOST_GRACE_S <= limit_s < float("inf"):
        raise ValueError(f"DANAUS_GRACE_S={text}: expected seconds, at least {MIN_HOST_GRACE_S:g}")
    return limit_s


def fan_out() -> int:
    """How many agents one agent passes things on to: ``DANAUS_FAN_OUT``, 8 by default.

    Raises:
        ValueError: It is no number, or less than 1.
    """
    text = os.environ.get("DANAUS_FAN_OUT", "").strip() or "8"
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"DANAUS_FAN_OUT={text}: expected a number, 1 or more")
    return int(text)


def plain_bulk() -> bool:
    """Whether direct streams between hosts go without encryption: ``DANAUS_PLAIN_BULK``."""
    return os.environ.get("DANAUS_PLAIN_BULK", "").strip().lower() in {"1", "true", "yes"}


def bulk_ports() -> range:
    """Ports that direct streams between hosts are served on, ``DANAUS_BULK_PORTS`` as in ``40000-40999``; else any.

    Raises:
        ValueError: It is no such range.
    """
    text = os.environ.get("DANAUS_BULK_PORTS", "").strip()
    first, _, last = text.partition("-")
    if not text:
        return range(1)
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last) < 1 << 16):
        raise ValueError(f"DANAUS_BULK_PORTS={text}: expected two ports, as in 40000-40999; each process takes one")
    return range(int(first), int(last) + 1)


def use_nixl() -> bool:
    """Whether remote buffers of other hosts are reached by NIXL, which does not encrypt: ``DANAUS_NIXL``."""
    return os.environ.get("DANAUS_NIXL", "").strip().lower() in {"1", "true", "yes"}


MIN_HOST_GRACE_S = 1.0
"""The least grace period of hosts: below it, a busy machine looks like a lost one."""

MIN_STUCK_S = 0.2
"""The least limit for stuck processes: below it, a busy machine looks like one."""

KEEP_LOG_DIRS = 20
"""Jobs whose log files are kept."""

GRACE_S = 4.0
"""Time a process has for its actors' cleanup, before SIGTERM."""

GRACE_AFTER_ERROR_S = 1.0
"""The same where the caller is on its way out with an exception, or is gone."""
