"""Where the elements of strided arrays lie, against numpy's own idea of it."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danaus.runtime.bulk.layout import Layout, contiguous
from danaus.runtime.bulk.memory import wrap


def bytes_at(pieces: Any) -> bytes:
    return b"".join(ctypes.string_at(int(address), int(length)) for address, length in pieces)


@st.composite
def views(draw: st.DrawFn) -> Any:
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    dtype = draw(st.sampled_from(["uint8", "int16", "float32", "float64", "complex128"]))
    array: Any = np.arange(int(np.prod(shape))).astype(dtype).reshape(shape)
    steps = draw(st.lists(st.sampled_from([1, 1, 2, -1]), min_size=len(shape), max_size=len(shape)))
    array = array[tuple(slice(None, None, step) for step in steps)]
    return array.transpose(draw(st.permutations(range(array.ndim))))


@given(views(), st.data())
def test_pieces_are_the_bytes_in_row_major_order(array: Any, data: st.DataObject) -> None:
    layout = wrap(array).layout
    expected = np.ascontiguousarray(array).tobytes()
    offset = data.draw(st.integers(0, len(expected) - 1))
    length = data.draw(st.integers(1, len(expected) - offset))
    most = data.draw(st.integers(1, 7))

    pieces, covered = layout.pieces(offset, length, most)

    assert 0 < covered <= length
    assert len(pieces) <= most
    assert covered == length or len(pieces) == most
    assert bytes_at(pieces) == expected[offset : offset + covered]


@given(views())
def test_no_element_lies_outside_the_extent(array: Any) -> None:
    layout = wrap(array).layout
    pieces, _ = layout.pieces(0, layout.size_bytes, 1 << 20)
    low, high = layout.extent

    assert min(address for address, _ in pieces) == low
    assert max(address + length for address, length in pieces) == high


def test_runs_are_as_long_as_memory_is_contiguous() -> None:
    cube: Any = np.zeros((4, 6, 8), "float32")

    assert wrap(cube).layout.is_contiguous
    assert wrap(cube[:, :, :3]).layout.run_bytes == 12
    assert wrap(cube[:, :2]).layout.run_bytes == 64
    assert wrap(cube[::2]).layout.run_bytes == 6 * 8 * 4
    assert wrap(cube.T).layout.run_bytes == 4
    assert wrap(cube[1:2, :, :]).layout.is_contiguous
    assert wrap(cube[:, :0, ::2]).layout.is_contiguous


def test_repeated_elements_are_seen() -> None:
    assert wrap(np.broadcast_to(np.zeros(3), (4, 3))).layout.repeats
    assert not wrap(np.zeros((1, 3))).layout.repeats


@pytest.mark.parametrize("size", [0, 1, 100])
def test_plain_bytes_are_one_piece(size: int) -> None:
    layout = contiguous(1000, size)

    assert layout == Layout(1000, (size,), (1,), 1)
    assert layout.pieces(0, size, 1) == ([(1000, size)], size)
