"""Tells a kill by the kernel for want of memory from any other SIGKILL: the cgroup's counter of such kills has grown.

:class:`OomTally` is arithmetic; :class:`OomWatch` reads the files, of cgroup version 1 (``memory.oom_control``), of
version 2 (``memory.events``), and of the machine (``/proc/vmstat``) where the cgroup has neither. What the counters
count may also have been a child that a proc started; a kill counts for one death of the seconds around it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .admission import _UNLIMITED, _bytes, _cgroup_dirs, _read_int, _read_table

if TYPE_CHECKING:
    from collections.abc import Iterator

MEMORY_S: Final = 10.0
"""How long after a kill was counted a death may be its doing: a process with much memory takes a while to end."""

LIKELIER: Final = 100
"""What procs add to their ``oom_score_adj``, in thousandths of the memory: they go before agent and controller."""

_COUNTERS: Final = ("memory.events", "memory.oom_control")
_LIMITS: Final = ("memory.max", "memory.limit_in_bytes")


class OomTally:
    """One counter's growth, and how much of it deaths have been blamed on."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._grown_at_s: list[float] = []

    def on_count(self, count: int, *, now_s: float) -> None:
        """The counter was read."""
        self._grown_at_s += [now_s] * (count - self.count)
        self.count = count

    def take(self, *, now_s: float) -> bool:
        """Whether a kill is there that no death was blamed on yet; it is, now."""
        self._grown_at_s = [at_s for at_s in self._grown_at_s if now_s - at_s <= MEMORY_S]
        if not self._grown_at_s:
            return False
        self._grown_at_s.pop(0)
        return True


class OomWatch:
    """The counters that tell of kills among the processes of this host's agent.

    Args:
        root: Where /proc and /sys are looked for.
    """

    def __init__(self, root: str = "/") -> None:
        self._root = Path(root)
        self._own = self._group_of("self")
        self._folders: dict[str, tuple[Path, str]] = {}
        self._tallies: dict[Path, OomTally] = {}
        self._elsewhere: dict[str, str] = {}
        self._add(self._own, "self")

    def on_started(self, proc: str, pid: int) -> None:
        """A process has started; it may have been put into a cgroup of its own."""
        group = self._group_of(str(pid))
        if group not in {self._own, ""}:
            self._elsewhere[proc] = group
            self._add(group, str(pid))

    def look(self, *, now_s: float) -> None:
        """Read the counters, so that growth is not taken for news later."""
        for path, tally in self._tallies.items():
            tally.on_count(_read_table(path).get("oom_kill", tally.count), now_s=now_s)

    def on_killed(self, proc: str, *, now_s: float) -> str:
        """``proc`` has ended by SIGKILL: return what to say if the kernel did it for want of memory, else nothing."""
        group = self._elsewhere.pop(proc, self._own)
        path, limit = self._folders[group]
        self.look(now_s=now_s)
        tally = self._tallies.get(path)
        if tally is None or not tally.take(now_s=now_s):
            return ""
        return f"{limit}; {path} counts {tally.count} such kills. Give it more memory, or have it use less"

    def on_exit(self, proc: str) -> None:
        """``proc`` is gone."""
        self._elsewhere.pop(proc, None)

    def _group_of(self, pid: str) -> str:
        """Text that is equal for processes of the same cgroups."""
        with contextlib.suppress(OSError):
            return (self._root / "proc" / pid / "cgroup").read_text()
        return ""

    def _add(self, group: str, pid: str) -> None:
        if group in self._folders:
            return
        folders = list(_cgroup_dirs(self._root, "memory", pid))
        path = next(self._counters(folders), self._root / "proc/vmstat")
        self._folders[group] = path, _limit(folders)
        table = _read_table(path)
        if "oom_kill" in table:
            self._tallies.setdefault(path, OomTally(table["oom_kill"]))

    @staticmethod
    def _counters(folders: list[tuple[str, Path]]) -> Iterator[Path]:
        # The innermost: version 1 counts a kill where the process was, version 2 there and in what is above.
        for _, folder in folders:
            for name in _COUNTERS:
                if "oom_kill" in _read_table(folder / name):
                    yield folder / name


def _limit(folders: list[tuple[str, Path]]) -> str:
    """Name the tightest limit."""
    limits = [
        (limit, group, folder / name)
        for group, folder in folders
        for name in _LIMITS
        if (limit := _read_int(folder / name)) is not None and limit < _UNLIMITED
    ]
    if not limits:
        return "no cgroup limits its memory: the machine had run out"
    limit, group, path = min(limits)
    return f"cgroup {group} may use {_bytes(limit)} ({path})"


def be_likelier(path: str = "/proc/self/oom_score_adj") -> None:
    """Have the kernel kill this process, and what it starts, before agent and controller."""
    with contextlib.suppress(OSError, ValueError), open(path, "r+", encoding="ascii") as file:
        score = min(1000, int(file.read()) + LIKELIER)
        file.seek(0)
        file.write(str(score))
