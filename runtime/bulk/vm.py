"""``process_vm_readv`` and ``process_vm_writev``: copies between this process's memory and another's, by the kernel.

They release the GIL while they copy. Linux permits them between processes of one user, unless Yama's ``ptrace_scope``
or a container's seccomp filter says otherwise.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .layout import Layout

IOV_MAX: Final = 1024
"""Pieces that one call takes on either side; Linux has no other value."""

MAX_BYTES: Final = 1 << 30
"""Most that is asked of one call; the kernel's own limit is just below 2 GiB."""

_REFUSALS: Final = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS})
_libc: Any = ctypes.CDLL(None, use_errno=True)


class NotPermitted(Exception):  # noqa: N818  names a state; never leaves this package
    """The kernel lets this process not touch the other's memory."""


class _Piece(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def copy(pid: int, theirs: Layout, ours: Layout, at: tuple[int, int], length: int, *, is_read: bool) -> int:
    """Copy up to ``length`` bytes once; return how many, at least one.

    Args:
        pid: Process that ``theirs`` describes the memory of.
        theirs: Memory of the other process.
        ours: Memory of this one.
        at: Offsets in ``theirs`` and ``ours``.
        length: Bytes wanted; more than zero.
        is_read: Whether bytes come here; else they go there.

    Raises:
        NotPermitted: This way is closed.
        ProcessLookupError: The process is gone.
        OSError: Part of the memory is not mapped any more.
    """
    length = min(length, MAX_BYTES)
    remote, length = theirs.pieces(at[0], length, IOV_MAX)
    local, fits = ours.pieces(at[1], length, IOV_MAX)
    if fits < length:
        remote, length = theirs.pieces(at[0], fits, IOV_MAX)
    call = _libc.process_vm_readv if is_read else _libc.process_vm_writev
    local, remote = _vector(local), _vector(remote)
    moved = call(pid, *local[:2], *remote[:2], 0)
    if moved > 0:
        return moved
    code = ctypes.get_errno() if moved < 0 else errno.EFAULT
    if code in _REFUSALS:
        raise NotPermitted(os.strerror(code))
    if code == errno.ESRCH:
        raise ProcessLookupError(code, os.strerror(code))
    raise OSError(code, f"copying {length} bytes {'from' if is_read else 'to'} process {pid}: {os.strerror(code)}")


def _vector(pieces: Any) -> tuple[int, int, Any]:
    """Address and number of the pieces, as C wants them, and what keeps them alive."""
    if isinstance(pieces, list):
        array = (_Piece * 1)(*pieces)
        return ctypes.addressof(array), 1, array
    return pieces.ctypes.data, len(pieces), pieces


@functools.cache
def process_vm_refusal() -> str | None:
    """Say why memory of this user's other processes cannot be copied directly, or None where it can. Looked up once."""
    if not hasattr(_libc, "process_vm_readv"):
        return "this C library has no process_vm_readv"
    scope = _ptrace_scope()
    if scope >= 2 and os.geteuid() != 0:
        return f"kernel.yama.ptrace_scope is {scope}: set it to 0 or 1"
    # Another process's memory and not our own: that of this one is always permitted.
    probe = "import ctypes, sys; b = ctypes.create_string_buffer(8); print(ctypes.addressof(b), flush=True); input()"
    command = [sys.executable, "-SIc", probe]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:  # noqa: S603  our own
        assert child.stdout is not None
        there, here = int(child.stdout.readline()), ctypes.create_string_buffer(8)
        from .layout import contiguous

        try:
            copy(child.pid, contiguous(there, 8), contiguous(ctypes.addressof(here), 8), (0, 0), 8, is_read=True)
        except (NotPermitted, OSError) as error:
            return f"process_vm_readv is refused: {error}"
        finally:
            child.communicate(b"\n")
    return None


def process_vm_allowed() -> bool:
    """Whether memory can be copied directly between this user's processes; starts a short process the first time."""
    return process_vm_refusal() is None


def _ptrace_scope() -> int:
    try:
        return int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


for _name in ("process_vm_readv", "process_vm_writev"):
    if hasattr(_libc, _name):
        _call = getattr(_libc, _name)
        _call.restype = ctypes.c_ssize_t
        _size = ctypes.c_ulong
        _call.argtypes = [ctypes.c_int, ctypes.c_void_p, _size, ctypes.c_void_p, _size, _size]
