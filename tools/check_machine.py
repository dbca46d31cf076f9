"""Looks at what the kernel and this machine's limits allow."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.host.admission import Limits, Need, Resource, max_procs, read_limits
from .check import Check, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

LOW_OPEN_FILES = 4096
LOW_SHM_BYTES = 1 << 30
_MIB = 1 << 20

# Runs as a sibling of the process that it looks at, as two procs of one mesh are: what a parent may do to its child
# says nothing about them. Usage: PID FD.
_SIBLING = """
import ctypes, json, os, sys
pid, fd = int(sys.argv[1]), int(sys.argv[2])
def attempt(call):
    try:
        call()
    except OSError as error:
        return error.strerror
def read_memory():
    line = next(line for line in open(f"/proc/{pid}/maps") if " r" in line)
    class Part(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
    room = ctypes.create_string_buffer(8)
    local, remote = Part(ctypes.addressof(room), 8), Part(int(line.split("-")[0], 16), 8)
    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.process_vm_readv
    call.restype = ctypes.c_ssize_t
    call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
    if call(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
print(json.dumps([attempt(lambda: os.close(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY))), attempt(read_memory)]))
"""


def check_machine() -> Iterator[Check]:
    """Yield a finding for each limit and each permission that the runtime depends on."""
    limits = read_limits()
    yield check_processors()
    yield check_room(limits)
    yield from (check_bound(limits, kind) for kind in (Resource.MEMORY, Resource.TASKS))
    yield check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield check_shm(limits)
    yield check_pidfd()
    yield check_proc_files()
    yield from check_siblings()
    yield check_user(os.getuid())


def check_processors() -> Check:
    """The processors that this process may use, and what a cgroup leaves of them."""
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = _cpu_quota()
    detail = f"{usable} of {present} usable"
    if quota is not None and quota < usable:
        fix = "raise the container's CPU limit, or start fewer procs"
        return Check("processors", Status.WARNING, f"{detail}, but a cgroup allows the time of {quota:g}", fix)
    return Check("processors", Status.OK, detail)


def _cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs' worth of time that the cgroup mounted at ``root`` allows, None for no limit."""
    for name in ("cpu.max", "cpu/cpu.cfs_quota_us"):
        with contextlib.suppress(OSError, ValueError):
            fields = (root / name).read_text().split()
            if name == "cpu.max":
                return int(fields[0]) / int(fields[1])
            period_us = int((root / "cpu/cpu.cfs_period_us").read_text())
            return int(fields[0]) / period_us if int(fields[0]) > 0 else None
    return None


def check_room(limits: Limits) -> Check:
    """How many processes a mesh could have here."""
    room = max_procs(limits, Need())
    if room is None:
        return Check("room", Status.OK, "no limit on the number of procs was found")
    detail = f"for {room} more idle procs ({Need().memory_bytes // _MIB} MiB each)"
    if room:
        return Check("room", Status.OK, detail)
    return Check("room", Status.MISSING, detail, "see the limits below")


def check_bound(limits: Limits, kind: Resource) -> Check:
    """The tightest bound on a resource."""
    bounds = [bound for bound in limits.bounds if bound.resource is kind]
    name = kind.value.partition(" ")[0]
    if not bounds:
        return Check(name, Status.OK, "no limit was found")
    tightest = min(bounds, key=lambda bound: bound.free)
    unit, text = (_MIB, " MiB") if kind is Resource.MEMORY else (1, "")
    detail = f"{tightest.free // unit}{text} of {tightest.limit // unit}{text} free ({tightest.name})"
    if max_procs(Limits((tightest,)), Need()) == 0:
        return Check(name, Status.MISSING, detail, tightest.remedy)
    return Check(name, Status.OK, detail)


def check_open_files(soft: int, hard: int) -> Check:
    """The limit on open files, of which a host agent needs some eight for each proc."""

    def text(limit: int) -> str:
        return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)

    detail = f"{text(soft)} (hard limit {text(hard)})"
    if soft != resource.RLIM_INFINITY and soft < LOW_OPEN_FILES:
        fix = f"`ulimit -n {LOW_OPEN_FILES}` for meshes of hundreds of procs"
        return Check("open files", Status.WARNING, detail, fix)
    return Check("open files", Status.OK, detail)


def check_shm(limits: Limits) -> Check:
    """/dev/shm, which NCCL and torch's data loaders use; the runtime's own segments have no name and need none."""
    bound = next((bound for bound in limits.bounds if bound.resource is Resource.SHARED_MEMORY), None)
    if bound is None:
        return Check("/dev/shm", Status.WARNING, "not mounted; NCCL and data loaders want it", "mount a tmpfs there")
    detail = f"{bound.free // _MIB} MiB of {bound.limit // _MIB} MiB free"
    if bound.free < LOW_SHM_BYTES:
        return Check("/dev/shm", Status.WARNING, f"{detail}; NCCL and data loaders want more", bound.remedy)
    return Check("/dev/shm", Status.OK, detail)


def check_pidfd() -> Check:
    """Pidfds, by which deaths are seen, and memfds, in which large buffers travel."""
    try:
        os.close(os.pidfd_open(os.getpid()))
        os.close(os.memfd_create("danaus-doctor"))
    except (AttributeError, OSError) as error:
        fix = "Linux 5.4 or newer; in a container, a seccomp profile that allows pidfd_open and memfd_create"
        return Check("pidfd, memfd", Status.MISSING, str(error), fix)
    return Check("pidfd, memfd", Status.OK, "permitted")


def check_proc_files() -> Check:
    """The files of /proc that the host agent reads."""
    wanted = [Path("/proc/self/stat"), Path(f"/proc/self/task/{os.getpid()}/children"), Path("/proc/self/fd")]
    lacking = [str(path) for path in wanted if not path.exists()]
    if lacking:
        fix = "mount /proc; the kernel needs CONFIG_PROC_CHILDREN"
        return Check("/proc", Status.MISSING, f"lacks {', '.join(lacking)}", fix)
    return Check("/proc", Status.OK, "mounted")


def check_siblings() -> Iterator[Check]:
    """What one proc may see of another: its descriptors (shared memory) and its memory."""
    fd = os.memfd_create("danaus-doctor")
    # `cat` waits for the end of its input, and goes with it.
    target = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[fd])
    try:
        command = [sys.executable, "-I", "-S", "-c", _SIBLING, str(target.pid), str(fd)]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        open_error, read_error = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        open_error = read_error = f"could not be tried: {error}"
    finally:
        os.close(fd)
        target.communicate()
    if open_error:
        fix = "run all procs as one user in one pid namespace; large buffers are copied through sockets until then"
        yield Check("shared memory", Status.WARNING, f"/proc/PID/fd of a sibling cannot be opened: {open_error}", fix)
    else:
        yield Check("shared memory", Status.OK, "a proc can open another's segments")
    if read_error:
        fix = "sysctl kernel.yama.ptrace_scope=0 (docker: --cap-add SYS_PTRACE); one-sided reads are slower until then"
        yield Check("process_vm_readv", Status.WARNING, f"refused between siblings: {read_error}", fix)
    else:
        yield Check("process_vm_readv", Status.OK, "permitted between siblings")


def check_user(uid: int) -> Check:
    """Who runs this; nothing but some tests needs root."""
    return Check("user", Status.OK, "root" if uid == 0 else f"uid {uid}, not root (nothing needs it but some tests)")
