"""The largest whole part of a mesh: compared with trying every box, and quick where trying is out of the question."""

from __future__ import annotations

import itertools
import math
import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danaus.runtime.supervision.health import largest_box

if TYPE_CHECKING:
    from collections.abc import Sequence

    from danaus.runtime.supervision.health import Box


def by_trying(sizes: Sequence[int], holes: set[int]) -> Box | None:
    """Try every box: the largest, then the first start, then the smallest stops."""
    cells = {cell for number, cell in enumerate(itertools.product(*map(range, sizes))) if number in holes}
    spans = [list(itertools.combinations(range(size + 1), 2)) for size in sizes]
    whole = [box for box in itertools.product(*spans) if cells.isdisjoint(itertools.product(*(range(*s) for s in box)))]
    return min(
        whole,
        key=lambda box: (-math.prod(b - a for a, b in box), [a for a, _ in box], [b for _, b in box]),
        default=None,
    )


@st.composite
def grids(draw: st.DrawFn) -> tuple[list[int], set[int]]:
    sizes = draw(st.lists(st.integers(1, 4), max_size=3))
    return sizes, draw(st.sets(st.integers(0, math.prod(sizes) - 1)))


@settings(deadline=None)
@given(grid=grids())
def test_the_box_is_the_one_that_trying_all_finds(grid: tuple[list[int], set[int]]) -> None:
    assert largest_box(*grid) == by_trying(*grid)


def test_a_mesh_without_holes_is_whole() -> None:
    assert largest_box((2, 3), ()) == ((0, 2), (0, 3))


def test_a_mesh_of_holes_has_no_whole_part() -> None:
    assert largest_box((2, 2), range(4)) is None
    assert largest_box((), [0]) is None


def test_of_equal_boxes_the_first_wins_and_keeps_the_last_dimensions_long() -> None:
    assert largest_box((3,), [1]) == ((0, 1),)
    assert largest_box((2, 2), [3]) == ((0, 1), (0, 2))


def test_lost_hosts_cost_their_hosts_and_no_more() -> None:
    lost = [host * 8 + gpu for host in (3, 10) for gpu in range(8)]

    assert largest_box((16, 8), lost) == ((4, 10), (0, 8))


@pytest.mark.parametrize("hole", [-1, 6])
def test_a_hole_outside_of_the_grid_is_refused(hole: int) -> None:
    with pytest.raises(IndexError, match="2 x 3 has cells 0 to 5"):
        largest_box((2, 3), [hole])


@pytest.mark.parametrize(
    ("sizes", "num_holes"), [((8, 8, 8, 8), 20), ((4096,), 50), ((4096,), 2048), ((64, 64), 100)], ids=str
)
def test_large_meshes_are_no_trouble(sizes: tuple[int, ...], num_holes: int) -> None:
    num_cells = math.prod(sizes)
    holes = set(random.Random(num_holes).sample(range(num_cells), num_holes))
    cells = list(itertools.product(*map(range, sizes)))

    box = largest_box(sizes, holes)

    assert box is not None
    inside = [all(a <= place < b for (a, b), place in zip(box, cell, strict=True)) for cell in cells]
    assert not any(inside[hole] for hole in holes)
    assert sum(inside) >= (num_cells - num_holes) / (num_holes + 1)
