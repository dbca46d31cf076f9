"""Turns values into bytes and buffers, and back.

Pickle protocol 5 with buffers out of band; cloudpickle for what plain pickle cannot name (lambdas, classes of
``__main__``). Numpy arrays arrive read-only whatever their size (but those of Python objects, and subclasses), tensors
as private copies, or as views of the sender's segment where the endpoint asks to ``borrow``.

Loading runs user code (``__setstate__``, constructors), so it happens on the thread that uses the value, never on the
thread that does I/O.
"""

from __future__ import annotations

import io
import pickle
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import cloudpickle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

IN_BAND_BYTES: Final = 16 << 10
"""Buffers up to this size travel inside the pickle: a frame of their own would cost more than the copy."""

_PLAIN: Final = frozenset({int, str, float, bool, type(None), bytes, complex})
_NAMES: Final = frozenset({str})
_borrowing = threading.local()


@dataclass(frozen=True, slots=True)
class Payload:
    """A pickled value: ``body`` and the buffers that stayed outside of it (none for small values)."""

    body: bytes
    buffers: tuple[memoryview, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of the body and all buffers."""
        return len(self.body) + sum(view.nbytes for view in self.buffers)


class _Pickler(cloudpickle.Pickler):
    """Cloudpickle with buffers of arrays and tensors kept outside, where they are large."""

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        numpy = sys.modules.get("numpy")
        if numpy is not None and kind is numpy.ndarray and not obj.dtype.hasobject and obj.dtype.itemsize:
            return _reduce_array(obj)
        torch = sys.modules.get("torch")
        if torch is not None and hasattr(torch, "Tensor") and isinstance(obj, torch.Tensor):
            from . import tensors

            if tensors.is_plain(obj):
                return tensors.reduce_tensor(obj)
        return super().reducer_override(obj)


def dump(value: Any) -> Payload:
    """Pickle ``value`` as it is now; the buffers still alias it, so copy or send them before returning to user code.

    Raises:
        Exception: Whatever pickling raised; the caller names the argument and the call.
    """
    if _is_plain(value, 4):
        return Payload(dump_plain(value))
    buffers: list[memoryview] = []

    def keep_outside(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes <= IN_BAND_BYTES:
            return True
        buffers.append(view)
        return False

    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=keep_outside).dump(value)
    return Payload(file.getvalue(), tuple(buffers))


def is_plain_tuple(values: tuple[Any, ...]) -> bool:
    """Whether all of ``values`` are numbers, text or None, which plain pickle carries fastest."""
    return _PLAIN.issuperset(map(type, values))


def dump_plain(value: Any) -> bytes:
    """Pickle what :func:`is_plain_tuple` is true of (or plain containers of such)."""
    return pickle.dumps(value, 5)


def load(body: bytes | memoryview, buffers: Sequence[Any] = (), *, borrow: bool = False) -> Any:
    """Return the value that :func:`dump` pickled.

    Args:
        body: The pickle.
        buffers: Its out-of-band buffers, in order.
        borrow: Build tensors on the buffers themselves (which must then not be written to), not on copies.
    """
    if not buffers:
        return pickle.loads(body)  # noqa: S301  only authenticated peers of the job reach this
    _borrowing.value = borrow
    try:
        return pickle.loads(body, buffers=buffers)  # noqa: S301  only authenticated peers of the job reach this
    finally:
        _borrowing.value = False


def is_borrowing() -> bool:
    """Whether the load that runs on this thread may build tensors on the received buffers."""
    return getattr(_borrowing, "value", False)


def _is_plain(value: Any, depth: int) -> bool:  # noqa: PLR0911  one line per kind
    kind = type(value)
    if kind in _PLAIN:
        return True
    if not depth:
        return False
    if kind is dict:
        if not _NAMES.issuperset(map(type, value)):
            return False
        value = value.values()
    elif (kind is not tuple and kind is not list) or len(value) > 16:
        return False
    if len(value) > 16:
        return False
    for item in value:  # noqa: SIM110  a loop is faster here
        if type(item) not in _PLAIN and not _is_plain(item, depth - 1):
            return False
    return True


def _reduce_array(array: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    flat = array if array.flags.c_contiguous or order == "F" else array.copy()
    raw = flat.reshape(-1, order=order).view("u1") if flat.size else flat.reshape(-1).view("u1")
    # The name of a plain dtype loads ten times faster than the dtype itself.
    dtype = array.dtype.str if array.dtype.isbuiltin == 1 else array.dtype
    return _rebuild_array, (pickle.PickleBuffer(raw.data.toreadonly()), dtype, array.shape, order)


def _rebuild_array(buffer: Any, dtype: Any, shape: tuple[int, ...], order: str) -> Any:
    import numpy as np

    array = np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)  # pyright: ignore[reportCallIssue, reportArgumentType]
    array.flags.writeable = False
    return array
