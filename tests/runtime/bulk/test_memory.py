"""What users hand over as memory, and moving parts of it."""

from __future__ import annotations

import array as arrays
import ctypes
import mmap
import sys
from typing import Any

import numpy as np
import pytest

from danaus.runtime.bulk.memory import address_of, wrap

torch: Any = pytest.importorskip("torch")

CUBE: Any = np.arange(2 * 3 * 4 * 5, dtype="int32").reshape(2, 3, 4, 5)
VIEWS = {
    "whole": CUBE,
    "columns": CUBE[..., ::2],
    "backwards": CUBE[::-1, :, ::-1],
    "turned": CUBE.transpose(3, 1, 0, 2),
    "part": CUBE[:, 1:, :2, 3:],
    "scalar": CUBE[1, 2, 3, 4:5].reshape(()),
}


@pytest.mark.parametrize("name", VIEWS)
def test_every_range_of_elements_is_gathered_in_row_major_order(name: str) -> None:
    view = VIEWS[name]
    memory, expected = wrap(view), np.ascontiguousarray(view).tobytes()

    for first in range(0, len(expected), 4):
        for last in range(first, len(expected) + 1, 4):
            into = bytearray(last - first)
            memory.gather(first, memoryview(into))
            assert into == expected[first:last]


@pytest.mark.parametrize("name", VIEWS)
def test_what_is_scattered_goes_to_its_elements_and_nowhere_else(name: str) -> None:
    before = CUBE.copy()
    view = VIEWS[name]
    size = view.size * 4
    for first, last in [(0, size), (4, size), (0, size - 4), (size // 8 * 4, size // 4 * 4)]:
        CUBE[...] = 7777
        data = np.arange((last - first) // 4, dtype="int32") + 1
        wrap(view).scatter(first, memoryview(data.tobytes()))

        flat = view.reshape(-1)
        assert list(flat[first // 4 : last // 4]) == list(data)
        assert (CUBE == 7777).sum() == CUBE.size - len(data)
    CUBE[...] = before


def test_tensors_of_every_dtype_are_memory() -> None:
    for name in ("bfloat16", "float8_e4m3fn", "complex64", "bool", "complex128", "int64"):
        tensor = torch.arange(24).to(getattr(torch, name)).reshape(4, 6)
        memory = wrap(tensor[:, ::2])
        into = bytearray(memory.size_bytes)
        memory.gather(0, memoryview(into))

        assert memory.dtype == name
        assert bytes(into) == bytes(tensor[:, ::2].contiguous().reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("name", ["bfloat16", "float32", "complex128"])
def test_memory_of_a_device_is_moved_by_torch(name: str) -> None:
    """No GPU is needed: only the way by torch is taken."""
    tensor = torch.arange(2 * 3 * 8).to(getattr(torch, name)).reshape(2, 3, 8)[..., ::2]
    before = tensor.clone()
    plain, device = wrap(tensor), wrap(tensor)
    device.device = 0
    itemsize = tensor.element_size()

    for first, last in [(0, 24), (1, 23), (4, 8), (5, 6), (3, 17)]:
        expected, got = bytearray((last - first) * itemsize), bytearray((last - first) * itemsize)
        plain.gather(first * itemsize, memoryview(expected))
        device.gather(first * itemsize, memoryview(got))
        assert got == expected
        device.scatter(first * itemsize, memoryview(bytearray(len(got))))
        assert tensor.reshape(-1)[first:last].abs().sum() == 0
        device.scatter(first * itemsize, memoryview(got))
        assert tensor.equal(before)


def test_buffers_are_memory_and_keep_their_owner() -> None:
    data = bytearray(b"0123456789")
    memory = wrap(memoryview(data)[2:6])

    assert (memory.dtype, memory.layout.shape, memory.is_writable) == ("uint8", (4,), True)
    assert memory.flat(1, 2).tobytes() == b"34"
    with pytest.raises(BufferError, match="cannot be re-sized"):
        data.append(1)
    assert wrap(arrays.array("d", [1, 2])).dtype == "float64"
    with mmap.mmap(-1, 100) as pages:
        memory = wrap(pages)
        memory.scatter(0, memoryview(b"abc"))
        assert pages[:3] == b"abc"
        del memory


def test_a_strided_memoryview_is_memory() -> None:
    memory = wrap(memoryview(b"0123456789")[::-3])
    into = bytearray(4)

    memory.gather(0, memoryview(into))

    assert (bytes(into), memory.is_writable) == (b"9630", False)


def test_the_address_of_a_buffer_is_that_of_its_first_element() -> None:
    array: Any = np.arange(10, dtype="uint8")

    assert address_of(memoryview(array)) == array.ctypes.data
    assert address_of(memoryview(array)[::-1]) == array.ctypes.data + 9
    assert ctypes.string_at(address_of(memoryview(b"read only")), 4) == b"read"


def test_looking_for_an_address_keeps_nothing_exported() -> None:
    data = bytearray(10)
    before = sys.getrefcount(data)
    view = memoryview(data)
    for _ in range(100):
        address_of(view)
    del view

    data.append(1)
    assert sys.getrefcount(data) == before


@pytest.mark.parametrize(
    "thing",
    [
        pytest.param("text", id="text"),
        pytest.param(5, id="number"),
        pytest.param(np.array([None, 1]), id="objects"),
        pytest.param(torch.zeros(3).to_sparse(), id="sparse"),
        pytest.param(torch.zeros(3, device="meta"), id="meta"),
        pytest.param(torch.zeros(3, dtype=torch.complex64).conj(), id="conjugated"),
    ],
)
def test_what_has_no_plain_memory_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match="memory"):
        wrap(thing)
