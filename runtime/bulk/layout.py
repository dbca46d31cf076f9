"""Where the elements of an array lie: address, shape and strides. Pure arithmetic; nothing is read or written here.

Offsets count the bytes of the array as if it were contiguous, in row-major order; a *run* is the longest stretch of
them that is contiguous in memory too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Layout:
    """An array in some process's memory. Strides are in bytes and may be negative."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all elements, without the gaps."""
        return math.prod(self.shape) * self.itemsize

    @cached_property
    def run_dims(self) -> int:
        """How many of the last dimensions make up a run."""
        expected, dims = self.itemsize, 0
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                break
            expected *= size
            dims += 1
        return dims

    @cached_property
    def run_bytes(self) -> int:
        """Bytes of one run."""
        return math.prod(self.shape[len(self.shape) - self.run_dims :]) * self.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether all of it is one run."""
        return self.run_dims == len(self.shape) or not self.size_bytes

    @property
    def repeats(self) -> bool:
        """Whether elements share memory, as in an expanded tensor: what is written there is not defined."""
        return any(size > 1 and stride == 0 for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def extent(self) -> tuple[int, int]:
        """The lowest address of any element, and the first address above all of them."""
        if not self.size_bytes:
            return self.address, self.address
        reach = [(size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)]
        low = self.address + sum(step for step in reach if step < 0)
        return low, self.address + sum(step for step in reach if step > 0) + self.itemsize

    def pieces(self, offset: int, length: int, most: int) -> tuple[Any, int]:
        """Return at most ``most`` pieces of contiguous memory from ``offset`` on, and how many bytes they are.

        Returns:
            A list of (address, length), or a numpy array of such rows where there are several.
        """
        run = self.run_bytes
        if self.is_contiguous:
            return [(self.address + offset, length)], length
        first, skipped = divmod(offset, run)
        length = min(length, most * run - skipped)
        count = (skipped + length - 1) // run + 1
        import numpy as np

        index = np.arange(first, first + count, dtype=np.int64)
        pieces = np.empty((count, 2), dtype=np.int64)
        pieces[:, 0] = self.address
        outer = len(self.shape) - self.run_dims
        for size, stride in zip(reversed(self.shape[:outer]), reversed(self.strides[:outer]), strict=True):
            index, place = np.divmod(index, size)
            pieces[:, 0] += place * stride
        pieces[:, 1] = run
        pieces[0] += skipped, -skipped
        pieces[-1, 1] -= count * run - skipped - length
        return pieces, length


def contiguous(address: int, size_bytes: int) -> Layout:
    """Layout of plain bytes."""
    return Layout(address, (size_bytes,), (1,), 1)
