"""Wraps what a user hands over (tensor, array, bytes) as memory that transfers can read and write by offset.

Offsets are those of layout.py. Elements are moved as numbers of their size, whatever their dtype, so every dtype of
torch and numpy passes.
"""

from __future__ import annotations

import ctypes
import math
import sys
from typing import TYPE_CHECKING, Any, Final

from .layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

BYTES: Final = "uint8"
"""The dtype that matches every other one by its number of bytes."""

_FORMATS: Final = {
    **dict.fromkeys(("B", "c", "<B", "b"), BYTES),
    **{"?": "bool", "h": "int16", "H": "uint16", "i": "int32", "I": "uint32", "e": "float16", "f": "float32"},
    **{"d": "float64", "l": "int64", "L": "uint64", "q": "int64", "Q": "uint64"},
}
_ELEMENTS: Final = {1: "uint8", 2: "int16", 4: "int32", 8: "int64", 16: "complex128"}


class Memory:
    """One piece of this process's memory, kept alive by this object.

    Attributes:
        layout: Where it lies; of CUDA memory the addresses are those of the device.
        dtype: Name of its dtype; plain bytes are ``uint8``.
        is_writable: Whether a transfer may write to it.
        device: Index of the CUDA device, or None.
        owner: What the user gave.
    """

    def __init__(self, owner: Any, layout: Layout, dtype: str, *, is_writable: bool, device: int | None = None) -> None:
        self.owner, self.layout, self.dtype = owner, layout, dtype
        self.is_writable, self.device = is_writable, device
        self._elements: Any = None

    @property
    def size_bytes(self) -> int:
        """Bytes of all elements."""
        return self.layout.size_bytes

    @property
    def is_flat(self) -> bool:
        """Whether :meth:`flat` works."""
        return self.device is None and self.layout.is_contiguous

    def flat(self, offset: int, length: int) -> memoryview:
        """A writable view of a part of contiguous host memory."""
        if not length:
            return memoryview(bytearray())
        return memoryview((ctypes.c_ubyte * length).from_address(self.layout.address + offset)).cast("B")

    def gather(self, offset: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes from ``offset`` on; both are whole elements."""
        self._move(offset, into, is_read=True)

    def scatter(self, offset: int, data: memoryview) -> None:
        """Write ``data`` to the elements from ``offset`` on; both are whole elements."""
        self._move(offset, data, is_read=False)

    def _move(self, offset: int, other: memoryview, *, is_read: bool) -> None:
        if not other.nbytes:
            return
        if self.is_flat:
            address, outside = self.layout.address + offset, address_of(other)
            target, source = (outside, address) if is_read else (address, outside)
            # Unlike an assignment to a slice, this lets other threads run.
            ctypes.memmove(target, source, other.nbytes)
            return
        itemsize = self.layout.itemsize
        outside = self._wrap(other)
        done = 0
        for part in _parts(self._array(), offset // itemsize, other.nbytes // itemsize):
            count = math.prod(part.shape)
            staged = outside[done : done + count].reshape(part.shape)
            done += count
            if self.device is not None:
                (staged if is_read else part).copy_(part if is_read else staged)
            elif is_read:
                staged[...] = part
            else:
                part[...] = staged

    def _array(self) -> Any:
        """The elements as numbers of their size: a numpy array, or a tensor on the device."""
        if self._elements is None:
            self._elements = self._tensor() if self.device is not None else self._ndarray()
        return self._elements

    def _tensor(self) -> Any:
        import torch

        return self.owner.detach().view(getattr(torch, _ELEMENTS[self.layout.itemsize]))

    def _ndarray(self) -> Any:
        import numpy as np

        layout = self.layout
        low, high = layout.extent
        whole: Any = (ctypes.c_ubyte * (high - low)).from_address(low)
        kind = _ELEMENTS.get(layout.itemsize, f"V{layout.itemsize}")
        return np.ndarray(layout.shape, kind, whole, layout.address - low, layout.strides)

    def _wrap(self, view: memoryview) -> Any:
        if self.device is not None:
            import torch

            return torch.frombuffer(view, dtype=getattr(torch, _ELEMENTS[self.layout.itemsize]))
        import numpy as np

        return np.frombuffer(view, dtype=_ELEMENTS.get(self.layout.itemsize, f"V{self.layout.itemsize}"))


def _parts(array: Any, first: int, count: int) -> Iterator[Any]:
    """The parts of ``array`` that hold ``count`` elements from ``first`` on, in order: whole rows as far as it goes."""
    if count <= 0:
        return
    total = math.prod(array.shape)
    if count == total:
        yield array
        return
    if array.ndim == 1:
        yield array[first : first + count]
        return
    row = total // len(array)
    at, skipped = divmod(first, row)
    if skipped or count < row:
        inside = min(count, row - skipped)
        yield from _parts(array[at], skipped, inside)
        yield from _parts(array, first + inside, count - inside)
        return
    rows = count // row
    yield array[at : at + rows]
    yield from _parts(array, first + rows * row, count - rows * row)


def wrap(thing: Any) -> Memory:
    """Return ``thing`` as memory.

    Args:
        thing: A strided tensor on a CPU or CUDA device, an array without Python objects, or anything with a buffer
            (bytes, bytearray, memoryview, mmap).

    Raises:
        TypeError: It is none of these.
    """
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "Tensor") and isinstance(thing, torch.Tensor):
        return _wrap_tensor(torch, thing)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(thing, numpy.ndarray):
        return _wrap_array(thing)
    try:
        view = memoryview(thing)
    except TypeError:
        raise TypeError(
            f"a {type(thing).__name__} has no memory to transfer: give a tensor, a numpy array or a memoryview"
        ) from None
    dtype = _FORMATS.get(view.format, f"{view.format} of {view.itemsize} bytes")
    layout = Layout(address_of(view), view.shape or (), view.strides or (), view.itemsize)
    return Memory(view, layout, dtype, is_writable=not view.readonly)


def _wrap_tensor(torch: Any, tensor: Any) -> Memory:
    if (
        type(tensor) not in {torch.Tensor, torch.nn.Parameter}
        or tensor.layout is not torch.strided
        or tensor.is_quantized
        or tensor.is_conj()
        or tensor.is_neg()
        or tensor.device.type not in {"cpu", "cuda"}
    ):
        kind = f"{type(tensor).__name__} with {tensor.layout} on {tensor.device}"
        raise TypeError(
            f"a {kind} has no plain memory: give a strided tensor on a CPU or CUDA device (a DTensor's .to_local(), "
            ".resolve_conj(), .to_dense())"
        )
    itemsize = tensor.element_size()
    strides = tuple(stride * itemsize for stride in tensor.stride())
    layout = Layout(tensor.data_ptr(), tuple(tensor.shape), strides, itemsize)
    device = tensor.device.index if tensor.device.type == "cuda" else None
    return Memory(tensor, layout, str(tensor.dtype).removeprefix("torch."), is_writable=True, device=device)


def _wrap_array(array: Any) -> Memory:
    if array.dtype.hasobject or not array.dtype.itemsize:
        raise TypeError(f"an array of {array.dtype} has no plain memory: give one of numbers")
    address = array.__array_interface__["data"][0]
    layout = Layout(address, array.shape, array.strides, array.dtype.itemsize)
    name = array.dtype.name if array.dtype.isnative else str(array.dtype)
    return Memory(array, layout, name, is_writable=array.flags.writeable)


class _PyBuffer(ctypes.Structure):
    _fields_ = [
        *(("buf", ctypes.c_void_p), ("obj", ctypes.py_object), ("len", ctypes.c_ssize_t)),
        *(("itemsize", ctypes.c_ssize_t), ("readonly", ctypes.c_int), ("ndim", ctypes.c_int)),
        *((name, ctypes.c_void_p) for name in ("format", "shape", "strides", "suboffsets", "internal")),
    ]


_PYBUF_FULL_RO: Final = 0x011C


def address_of(view: memoryview) -> int:
    """Address of a buffer's first element, writable or not."""
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), _PYBUF_FULL_RO)
    address = buffer.buf or 0
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address
