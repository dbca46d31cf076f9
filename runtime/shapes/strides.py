"""Arithmetic of strided views, on tuples of ints: which base ranks a view has, and where in it each of them is.

Everything here holds for *canonical* views whose ranks ascend in row-major order; :class:`.shape.Region` says what that
means and sees to it.
"""

from __future__ import annotations

import math

Ints = tuple[int, ...]


def dense(sizes: Ints) -> Ints:
    """Return the strides of a mesh whose ranks are consecutive."""
    if 0 in sizes:
        return (1,) * len(sizes)
    strides, span = list[int](), 1
    for size in reversed(sizes):
        strides.append(span if size > 1 else 1)
        span *= size
    return tuple(reversed(strides))


def canonical(offset: int, sizes: Ints, strides: Ints) -> tuple[int, Ints, Ints]:
    """Return (offset, sizes, strides) of the same ranks without the freedom that no rank depends on."""
    if 0 in sizes:
        return 0, sizes, (1,) * len(sizes)
    if 1 in sizes:
        strides = tuple(1 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True))
    return offset, sizes, strides


def is_ascending(sizes: Ints, strides: Ints) -> bool:
    """Tell whether the ranks ascend strictly in row-major order, so that none occurs twice."""
    if 0 in sizes:
        return True
    span = 0
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1:
            if stride <= span:
                return False
            span += (size - 1) * stride
    return True


def all_ranks(offset: int, sizes: Ints, strides: Ints) -> Ints:
    """Return every base rank, in row-major order."""
    ranks = [offset]
    for size, stride in zip(sizes, strides, strict=True):
        steps = range(0, size * stride, stride)
        ranks = [rank + step for rank in ranks for step in steps]
    return tuple(ranks)


def rank_at(offset: int, sizes: Ints, strides: Ints, index: int) -> int:
    """Return the base rank of the member with row-major number ``index``, which has to exist."""
    rank = offset
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        index, step = divmod(index, size)
        rank += step * stride
    return rank


def find(offset: int, sizes: Ints, strides: Ints, base_rank: int) -> int | None:
    """Return the row-major number of the member with this base rank, or None."""
    rest, index = base_rank - offset, 0
    for size, stride in zip(sizes, strides, strict=True):
        step = 0
        if size != 1:
            step, rest = divmod(rest, stride)
        if not 0 <= step < size:
            return None
        index = index * size + step
    return None if rest else index


def split_stride(stride: int, sizes: Ints) -> Ints:
    """Return the strides of the dimensions that one dimension of stride ``stride`` is factored into."""
    return tuple(stride * math.prod(sizes[place + 1 :]) for place in range(len(sizes)))


def flat_stride(sizes: Ints, strides: Ints) -> tuple[int, tuple[int, int] | None]:
    """Return (stride, None) for evenly spaced ranks, else (0, (outer, inner)), the first two dimensions not to fit."""
    if 0 in sizes:
        return 1, None
    inner: int | None = None
    stride = spacing = 1
    for place in reversed(range(len(sizes))):
        if sizes[place] <= 1:
            continue
        if inner is None:
            stride = strides[place]
        elif strides[place] != spacing:
            return 0, (place, inner)
        inner, spacing = place, strides[place] * sizes[place]
    return stride, None
