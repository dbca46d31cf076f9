"""CUDA memory between processes of one host: the owner's allocation, opened here by CUDA's own IPC.

By the driver's C functions and not by torch's sharing of storages: that counts each sending of a handle, which must be
received exactly once, while a RemoteBuffer may be used many times by many processes. The owner keeps the memory alive
(registry.py). Memory of torch's expandable segments has no such handle, and goes through pinned host memory.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from .handle import CudaMemory

if TYPE_CHECKING:
    from .handle import Handle
    from .layout import Layout

MAX_OPEN: Final = 64
"""Allocations of others that are kept open."""

_HANDLE_BYTES: Final = 64
_LAZY_ENABLE_PEER_ACCESS: Final = 1


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * _HANDLE_BYTES)]


class CudaError(RuntimeError):
    """A function of the driver failed; never leaves this package."""


def describe(tensor: Any) -> CudaMemory:
    """How others open the memory of a CUDA ``tensor`` that is to be registered."""
    import torch

    uuid = str(torch.cuda.get_device_properties(tensor.device).uuid)
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _IpcHandle()
    if not tensor.numel():
        return CudaMemory(uuid, b"", 0)
    try:
        with torch.cuda.device(tensor.device):
            _make_current()
            address = ctypes.c_uint64(tensor.data_ptr())
            _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
            _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    except (CudaError, OSError):
        return CudaMemory(uuid, b"", 0)
    return CudaMemory(uuid, bytes(handle.reserved), tensor.data_ptr() - base.value)


def is_reachable(memory: CudaMemory) -> bool:
    """Whether this process sees the GPU, and the memory can be shared."""
    return bool(memory.handle) and _device_of(memory.uuid) is not None


def open_array(handle: Handle, layout: Layout) -> Any:
    """Return a buffer's memory as a tensor of numbers of its elements' size.

    Args:
        handle: The buffer.
        layout: Its layout in the owner's process, of which the address is not used.

    Raises:
        CudaError: The driver refused.
    """
    import torch

    memory = handle.cuda
    assert memory is not None
    device = _device_of(memory.uuid)
    address = _opened.address(memory, device) + memory.offset
    kind = {1: "|u1", 2: "<i2", 4: "<i4", 8: "<i8", 16: "<c16"}[layout.itemsize]

    interface = {"shape": layout.shape, "typestr": kind, "data": (address, False), "strides": layout.strides}
    return torch.as_tensor(_Array(interface | {"version": 3}), device=f"cuda:{device}")


class _Array:
    """Device memory as torch takes it from other libraries."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__cuda_array_interface__ = interface


class _Opened:
    """The allocations of other processes that are open here; the least recently used is closed first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._addresses: OrderedDict[bytes, int] = OrderedDict()

    def address(self, memory: CudaMemory, device: int | None) -> int:
        """Where the allocation begins in this process."""
        import torch

        with self._lock, torch.cuda.device(device):
            _make_current()
            found = self._addresses.get(memory.handle)
            if found is None:
                address = ctypes.c_uint64()
                handle = _IpcHandle.from_buffer_copy(memory.handle)
                _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS))
                found = self._addresses[memory.handle] = address.value
                if len(self._addresses) > MAX_OPEN:
                    _, oldest = self._addresses.popitem(last=False)
                    torch.cuda.synchronize()
                    _call("cuIpcCloseMemHandle", ctypes.c_uint64(oldest))
            self._addresses.move_to_end(memory.handle)
            return found


_opened = _Opened()


@functools.lru_cache(maxsize=64)
def _device_of(uuid: str) -> int | None:
    import torch

    if not torch.cuda.is_available():
        return None
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid:
            return index
    return None


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _make_current() -> None:
    """Have this thread's device be the driver's current one, which choosing it does not do by itself before CUDA 12."""
    import torch

    torch.cuda.current_stream().query()


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        raise CudaError(f"{name} returned {code}")
