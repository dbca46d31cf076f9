"""Finds the largest part of a mesh that is whole.

Pure. Every box without a hole lies to one side of each hole in some dimension, so a box that has a hole is replaced by
the parts on either side of it, at most two for each dimension. The largest box left is looked at first: the first one
found without a hole is the answer, and no part of a smaller box was ever looked at.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

Box = tuple[tuple[int, int], ...]
"""(start, stop) of each dimension."""

_Cells = list[tuple[int, ...]]


def largest_box(sizes: Sequence[int], holes: Iterable[int]) -> Box | None:
    """Return the largest axis-aligned box of a grid that contains no hole; None where every cell is one.

    Of equally large ones it is the one that starts first in row-major order, then the one that is longer in the last
    dimensions.

    Args:
        sizes: The grid's size in each dimension.
        holes: Row-major numbers of the cells to avoid.

    Raises:
        IndexError: A hole lies outside of the grid.
    """
    grid = tuple((0, size) for size in sizes)
    cells = [_cell(number, sizes) for number in sorted(set(holes))]
    # The first three decide the order and no two boxes are equal, so holes are never compared.
    waiting = [(-_volume(grid), *_corners(grid), grid, cells)] if _volume(grid) else []
    seen = {grid}
    while waiting:
        *_, box, inside = heapq.heappop(waiting)
        if not inside:
            return box
        for part in _parts(box, _most_central(box, inside)):
            if part not in seen:
                seen.add(part)
                heapq.heappush(waiting, (-_volume(part), *_corners(part), part, _within(part, inside)))
    return None


def _parts(box: Box, hole: tuple[int, ...]) -> Generator[Box]:
    for dim, ((start, stop), place) in enumerate(zip(box, hole, strict=True)):
        if start < place:
            yield *box[:dim], (start, place), *box[dim + 1 :]
        if place + 1 < stop:
            yield *box[:dim], (place + 1, stop), *box[dim + 1 :]


def _most_central(box: Box, holes: _Cells) -> tuple[int, ...]:
    """The hole that leaves the smallest largest part."""

    def largest_share(hole: tuple[int, ...]) -> float:
        sides = zip(box, hole, strict=True)
        return max((max(place - start, stop - 1 - place) / (stop - start) for (start, stop), place in sides), default=0)

    return min(holes, key=largest_share)


def _within(box: Box, holes: _Cells) -> _Cells:
    return [
        hole for hole in holes if all(start <= place < stop for (start, stop), place in zip(box, hole, strict=True))
    ]


def _volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _corners(box: Box) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(start for start, _ in box), tuple(stop for _, stop in box)


def _cell(number: int, sizes: Sequence[int]) -> tuple[int, ...]:
    if not 0 <= number < math.prod(sizes):
        raise IndexError(
            f"hole {number}: a grid of {' x '.join(map(str, sizes))} has cells 0 to {math.prod(sizes) - 1}"
        )
    places: list[int] = []
    for size in reversed(sizes):
        number, place = divmod(number, size)
        places.append(place)
    return tuple(reversed(places))
