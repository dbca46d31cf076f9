"""Decides whether a number of processes fits on this host, before the first one starts.

:func:`admit` is arithmetic over :class:`Limits` and :class:`Need`; :func:`read_limits` reads them from /proc, the
cgroups that this process is in (version 1 and 2, with their parents) and its resource limits. Whatever is not limited,
or cannot be read, is no bound.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AdmissionError

if TYPE_CHECKING:
    from collections.abc import Iterator

_MIB = 1 << 20
# cgroup version 1 writes "unlimited" as the largest multiple of a page below 2**63.
_UNLIMITED = 1 << 60
# CAP_SYS_ADMIN and CAP_SYS_RESOURCE: either lets a process ignore RLIMIT_NPROC.
_NPROC_EXEMPT = (1 << 21) | (1 << 24)


class Resource(Enum):
    """What processes need and hosts limit."""

    MEMORY = "memory"
    TASKS = "tasks (processes and threads)"
    DESCRIPTORS = "file descriptors of the host agent"
    SHARED_MEMORY = "/dev/shm"  # noqa: S108  a directory of mode 0700 is made inside


@dataclass(frozen=True, slots=True)
class Bound:
    """One limit: who sets it, how much it allows, how much of that is in use, and how to raise it."""

    resource: Resource
    name: str
    limit: int
    used: int
    remedy: str

    @property
    def free(self) -> int:
        """What is left, in bytes or pieces."""
        return max(0, self.limit - self.used)


@dataclass(frozen=True, slots=True)
class Limits:
    """Every bound that applies to processes started here; several may bound one resource."""

    bounds: tuple[Bound, ...]

    def free(self, kind: Resource) -> int | None:
        """Return what is left of a resource under its tightest bound, None where nothing bounds it."""
        return min((bound.free for bound in self.bounds if bound.resource is kind), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What one process needs, and what is needed once beside them."""

    memory_bytes: int = 25 * _MIB
    """Memory that a process does not share, once it is idle and ready."""
    tasks: int = 4
    """The process itself and its threads."""
    descriptors: int = 8
    """Open files that the agent holds for it: pidfd, pipes, log files, sockets."""
    shm_bytes: int = 0
    """Space in /dev/shm; the runtime's own segments need none."""
    base_memory_bytes: int = 0
    """Memory needed once, whatever the number of processes: a zygote that is not up yet."""

    def __post_init__(self) -> None:
        """Refuse negative needs."""
        for field in ("memory_bytes", "tasks", "descriptors", "shm_bytes", "base_memory_bytes"):
            if getattr(self, field) < 0:
                raise ValueError(f"Need.{field}={getattr(self, field)}: a need is zero or more")

    def per_proc(self, kind: Resource) -> int:
        """Return what one process needs of a resource."""
        return {
            Resource.MEMORY: self.memory_bytes,
            Resource.TASKS: self.tasks,
            Resource.DESCRIPTORS: self.descriptors,
            Resource.SHARED_MEMORY: self.shm_bytes,
        }[kind]

    def base(self, kind: Resource) -> int:
        """Return what is needed once."""
        return self.base_memory_bytes if kind is Resource.MEMORY else 0


def admit(num_procs: int, limits: Limits, need: Need) -> None:
    """Return where ``num_procs`` more processes fit.

    Raises:
        AdmissionError: they do not; the message holds the arithmetic and the largest number that fits.
    """
    exceeded = tuple(bound for bound in limits.bounds if _needed(num_procs, need, bound.resource) > bound.free)
    if num_procs > 0 and exceeded:
        raise AdmissionError(num_procs, max_procs(limits, need) or 0, _explain(num_procs, limits, need, exceeded))


def _explain(num_procs: int, limits: Limits, need: Need, exceeded: tuple[Bound, ...]) -> str:
    """Show the arithmetic of every bound exceeded."""
    most = max_procs(limits, need)
    sums = "\n  ".join(_arithmetic(num_procs, need, bound) for bound in exceeded)
    remedies = ", ".join(dict.fromkeys(bound.remedy for bound in exceeded))
    advice = f"ask for at most {most}" if most else "not even one fits"
    return f"no room for {num_procs} procs on this host; none was started:\n  {sums}\n  {advice}, or {remedies}"


def max_procs(limits: Limits, need: Need) -> int | None:
    """Return how many processes fit, None where nothing bounds them."""
    fits = (
        max(0, bound.free - need.base(bound.resource)) // need.per_proc(bound.resource)
        for bound in limits.bounds
        if need.per_proc(bound.resource)
    )
    return min(fits, default=None)


def available_memory_bytes() -> int:
    """Return the memory that this process may still take, by the machine's and its cgroups' word."""
    return Limits(tuple(_memory_bounds(Path("/")))).free(Resource.MEMORY) or 0


def read_limits(root: str | os.PathLike[str] = "/") -> Limits:
    """Read every bound on processes that this process starts. ``root`` is where /proc and /sys are looked for."""
    base = Path(root)
    return Limits((*_memory_bounds(base), *_task_bounds(base), *_descriptor_bounds(base), *_shm_bounds(base)))


def _needed(num_procs: int, need: Need, kind: Resource) -> int:
    return num_procs * need.per_proc(kind) + need.base(kind)


def _arithmetic(num_procs: int, need: Need, bound: Bound) -> str:
    kind = bound.resource
    text = _bytes if kind in {Resource.MEMORY, Resource.SHARED_MEMORY} else str
    base = f" + {text(need.base(kind))}" if need.base(kind) else ""
    total = f"{num_procs} procs x {text(need.per_proc(kind))}{base} = {text(_needed(num_procs, need, kind))}"
    left = f"{text(bound.free)} {'is' if text is _bytes else 'are'} available"
    return f"{kind.value}: {total}, but {left} ({bound.name}: limit {text(bound.limit)}, {text(bound.used)} in use)"


def _bytes(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.3g} {units[0]}" if size >= 10 or size == int(size) else f"{size:.1f} {units[0]}"


def _memory_bounds(root: Path) -> Iterator[Bound]:
    info = _read_table(root / "proc/meminfo")
    if "MemAvailable:" in info:
        total, available = info.get("MemTotal:", 0) * 1024, info["MemAvailable:"] * 1024
        yield Bound(Resource.MEMORY, "this machine", total, total - available, "free memory on the machine")
    for group, path in _cgroup_dirs(root, "memory"):
        limit_v2, limit_v1 = _read_int(path / "memory.max"), _read_int(path / "memory.limit_in_bytes")
        limit = limit_v2 if limit_v2 is not None else limit_v1
        used = _read_int(path / ("memory.current" if limit_v2 is not None else "memory.usage_in_bytes"))
        if limit is None or used is None or limit >= _UNLIMITED:
            continue
        stat = _read_table(path / "memory.stat")
        # Page cache that nobody uses is given back before anyone is killed.
        cache = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        file = "memory.max" if limit_v2 is not None else "memory.limit_in_bytes"
        yield Bound(Resource.MEMORY, f"cgroup {group}", limit, max(0, used - cache), f"raise {file} of {path}")


def _task_bounds(root: Path) -> Iterator[Bound]:
    for group, path in _cgroup_dirs(root, "pids"):
        limit, used = _read_int(path / "pids.max"), _read_int(path / "pids.current")
        if limit is not None and used is not None:
            yield Bound(Resource.TASKS, f"cgroup {group}", limit, used, f"raise pids.max of {path}")
    num_tasks = _total_tasks(root)
    for name in ("pid_max", "threads-max"):
        limit = _read_int(root / "proc/sys/kernel" / name)
        if limit is not None and num_tasks is not None:
            yield Bound(Resource.TASKS, f"kernel.{name}", limit, num_tasks, f"raise sysctl kernel.{name}")
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and not _exempt_from_nproc(root):
        name = f"RLIMIT_NPROC of user {os.getuid()}"
        yield Bound(Resource.TASKS, name, soft, _tasks_of_user(root, os.getuid()), "raise `ulimit -u`")


def _descriptor_bounds(root: Path) -> Iterator[Bound]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    try:
        used = len(os.listdir(root / "proc/self/fd"))
    except OSError:
        used = 0
    ceiling = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    yield Bound(Resource.DESCRIPTORS, "RLIMIT_NOFILE", soft, used, f"raise `ulimit -n` (hard limit {ceiling})")


def _shm_bounds(root: Path) -> Iterator[Bound]:
    path = root / "dev/shm"
    try:
        found = os.statvfs(path)
    except OSError:
        return
    total = found.f_blocks * found.f_frsize
    used = total - found.f_bavail * found.f_frsize
    yield Bound(Resource.SHARED_MEMORY, str(path), total, used, f"enlarge {path} (docker: --shm-size)")


def _cgroup_dirs(root: Path, controller: str, pid: str = "self") -> Iterator[tuple[str, Path]]:
    """Yield (group, folder) of a process's cgroup and its visible parents, in both hierarchies."""
    for line in _read_lines(root / "proc" / pid / "cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mounted, mount_point in _cgroup_mounts(root, controller if controllers else ""):
            # In a container the mount may show a subtree, and the path may be relative to the container.
            path = Path(group)
            inside = path.relative_to(mounted) if path.is_relative_to(mounted) else Path()
            folder = root / mount_point.lstrip("/") / inside
            for parent in [folder, *folder.parents[: len(inside.parts)]]:
                yield group, parent
                group = os.path.dirname(group) or "/"
            break


def _cgroup_mounts(root: Path, controller: str) -> Iterator[tuple[str, str]]:
    """Yield (mounted subtree, mount point) of a version 1 controller, or of version 2 for the empty name."""
    for line in _read_lines(root / "proc/self/mountinfo"):
        fields, _, after = line.partition(" - ")
        fs_type, _, options = after.split(" ", 2)
        wanted = controller in options.split(",") if controller else True
        if fs_type == ("cgroup" if controller else "cgroup2") and wanted:
            subtree, mount_point = fields.split(" ")[3:5]
            yield subtree, mount_point.replace("\\040", " ")


def _total_tasks(root: Path) -> int | None:
    # /proc/loadavg: "0.1 0.2 0.3 2/345 6789", runnable/all tasks.
    lines = _read_lines(root / "proc/loadavg")
    return int(lines[0].split()[3].partition("/")[2]) if lines else None


def _exempt_from_nproc(root: Path) -> bool:
    lines = _read_lines(root / "proc/self/status")
    effective = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    return os.getuid() == 0 or bool(int(effective, 16) & _NPROC_EXEMPT)


def _tasks_of_user(root: Path, uid: int) -> int:
    count = 0
    for path in (root / "proc").iterdir():
        try:
            if path.name.isdigit() and path.stat().st_uid == uid:
                count += len(os.listdir(path / "task"))
        except OSError:
            continue  # ended meanwhile
    return count


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _read_int(path: Path) -> int | None:
    """Return a file's number; None where there is no file, or it says "max"."""
    lines = _read_lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _read_table(path: Path) -> dict[str, int]:
    """Return ``name number`` lines as a dict."""
    rows = (line.split() for line in _read_lines(path))
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}
