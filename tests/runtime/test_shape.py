"""Shapes against numpy: a chain of views gives the same ranks as the same indexing of ``np.arange``."""

from __future__ import annotations

import doctest
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danaus.runtime.shapes import shape
from danaus.runtime.shapes.shape import Extent, Point, Region

if TYPE_CHECKING:
    from collections.abc import Callable

LABELS = ("hosts", "gpus", "tp", "pp", "dp", "ep", "cp", "sp", "x", "y", "z", "w")

# A busy machine is no reason to fail.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def region_of(**sizes: int) -> Region:
    return Extent.of(sizes).region


extents = st.lists(st.integers(0, 6), max_size=4).map(lambda sizes: Extent(LABELS[: len(sizes)], tuple(sizes)))


def _evenly_spaced(ranks: np.ndarray[Any, Any]) -> bool:
    return len(set(np.diff(ranks).tolist())) <= 1


def _draw_slice(data: st.DataObject, region: Region, array: Any) -> tuple[Region, Any]:
    picks: dict[str, int | slice] = {}
    index: list[int | slice] = []
    for label, size in zip(region.labels, region.sizes, strict=True):
        bound = st.none() | st.integers(0, size + 2)
        choices: list[st.SearchStrategy[Any]] = [
            st.none(),
            st.builds(slice, bound, bound, st.none() | st.integers(1, 4)),
        ]
        if size:
            choices.append(st.integers(0, size - 1))
        pick = data.draw(st.one_of(choices))
        index.append(slice(None) if pick is None else pick)
        if pick is not None:
            picks[label] = pick
    return region.slice(**picks), array[tuple(index)]


def _draw_split(data: st.DataObject, region: Region, array: Any) -> tuple[Region, Any]:
    splittable = [label for label, size in zip(region.labels, region.sizes, strict=True) if size]
    free = [label for label in LABELS if label not in region.labels]
    if not splittable or len(free) < 3:
        return region, array
    label = data.draw(st.sampled_from(splittable))
    place = region.labels.index(label)
    size = region.sizes[place]
    first = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    second = data.draw(st.sampled_from([n for n in range(1, size // first + 1) if size // first % n == 0]))
    factors = dict(zip(free, (first, second, size // first // second), strict=False))
    inferred = data.draw(st.none() | st.sampled_from(list(factors)))
    given_sizes = {name: factor for name, factor in factors.items() if name != inferred}
    shape = (*region.sizes[:place], *factors.values(), *region.sizes[place + 1 :])
    return region.split(**{label: tuple(factors)}, **given_sizes), array.reshape(shape)


def _draw_flatten(data: st.DataObject, region: Region, array: Any) -> tuple[Region, Any]:
    name = data.draw(st.sampled_from(LABELS))
    flat = array.reshape(-1)
    if _evenly_spaced(flat):
        return region.flatten(name), flat
    with pytest.raises(ValueError, match="evenly spaced"):
        region.flatten(name)
    return region, array


def _draw_rename(data: st.DataObject, region: Region, array: Any) -> tuple[Region, Any]:
    shuffled = data.draw(st.permutations(LABELS))[: len(region.labels)]
    return region.rename(**dict(zip(region.labels, shuffled, strict=True))), array


DRAWS = (_draw_slice, _draw_split, _draw_flatten, _draw_rename)


def _draw_view(data: st.DataObject) -> tuple[Region, Any]:
    extent = data.draw(extents)
    region, array = extent.region, np.arange(extent.nelements).reshape(extent.sizes)
    for draw in data.draw(st.lists(st.sampled_from(DRAWS), max_size=5)):
        region, array = draw(data, region, array)
    return region, array


@UNHURRIED
@given(st.data())
def test_chains_of_views_have_the_ranks_that_numpy_has(data: st.DataObject) -> None:
    region, array = _draw_view(data)

    assert region.sizes == array.shape
    assert region.nelements == array.size
    assert region.ranks() == tuple(array.flatten().tolist())
    assert region.is_dense == bool((np.diff(array.flatten()) == 1).all())


@UNHURRIED
@given(st.data())
def test_ranks_and_indices_of_a_view_are_inverse(data: st.DataObject) -> None:
    region, array = _draw_view(data)
    fresh = pickle.loads(pickle.dumps(region))

    members = array.flatten().tolist()
    assert [fresh.rank_at(index) for index in range(len(members))] == members
    assert [region.index_of(rank) for rank in members] == list(range(len(members)))
    assert [rank for rank in range(-3, 6**4) if rank in region] == members


@UNHURRIED
@given(st.data())
def test_points_of_a_view_are_numpy_coordinates(data: st.DataObject) -> None:
    region, array = _draw_view(data)

    for index, rank in zip(np.ndindex(array.shape), region.ranks(), strict=True):
        point = region.point_of(rank)
        assert tuple(point.values()) == index
        assert region.extent.point(**point) == point
        assert array[index] == rank


@UNHURRIED
@given(st.data())
def test_equal_ranks_and_dimensions_make_equal_regions(data: st.DataObject) -> None:
    region, array = _draw_view(data)
    other, _ = _draw_view(data)

    rebuilt = Region(region.labels, region.offset, region.sizes, region.strides)
    assert rebuilt == region
    assert hash(rebuilt) == hash(region)
    assert pickle.loads(pickle.dumps(region)) == region
    same = other.extent == region.extent and other.ranks() == tuple(array.flatten().tolist())
    assert (other == region) is same


@UNHURRIED
@given(extents)
def test_an_extent_iterates_over_its_points_in_rank_order(extent: Extent) -> None:
    points = list(extent)

    assert [point.rank for point in points] == list(range(extent.nelements))
    assert [tuple(point.values()) for point in points] == list(np.ndindex(extent.sizes))
    assert all(point in extent for point in points)
    assert points == [extent.point_of_rank(rank) for rank in range(extent.nelements)]


@UNHURRIED
@given(extents)
def test_extents_and_points_survive_pickling(extent: Extent) -> None:
    values = [extent, *extent]

    copies = pickle.loads(pickle.dumps(values))

    assert copies == values
    assert list(map(hash, copies)) == list(map(hash, values))


def test_an_extent_reads_as_a_mapping_from_label_to_size() -> None:
    extent = Extent.of({"hosts": 2}, gpus=4)

    assert dict(extent) == {"hosts": 2, "gpus": 4}
    assert extent["gpus"] == 4
    assert ("gpus" in extent, "tp" in extent, 3 in extent) == (True, False, False)
    assert len(extent) == 2
    assert str(extent) == "{'hosts': 2, 'gpus': 4}"
    assert repr(extent) == "Extent.of(hosts=2, gpus=4)"


def test_an_extent_takes_any_sequences_and_integers() -> None:
    extent: Any = Extent(["hosts"], [np.int64(2)])  # type: ignore[arg-type]

    assert extent == Extent(("hosts",), (2,))
    assert type(extent.sizes[0]) is int


def test_an_extent_without_dimensions_has_one_point() -> None:
    extent = Extent.of()

    assert extent.nelements == 1
    assert str(extent) == "{}"
    assert [dict(point) for point in extent] == [{}]
    assert extent.region.ranks() == (0,)
    assert extent.point().rank == 0


def test_an_extent_with_a_size_of_zero_has_no_points() -> None:
    extent = Extent.of(hosts=2, gpus=0)

    assert (extent.nelements, list(extent), extent.region.ranks()) == (0, [], ())
    assert Point(0, extent) not in extent


def test_a_point_prints_index_over_size() -> None:
    assert repr(Extent.of(hosts=1, gpus=2).point(hosts=0, gpus=1)) == "{'hosts': 0/1, 'gpus': 1/2}"
    assert str(Extent.of().point()) == "{}"


def test_a_point_equals_a_mapping_with_its_items_and_points_of_its_extent_only() -> None:
    point = Extent.of(hosts=1, gpus=2).point_of_rank(1)

    assert point == {"hosts": 0, "gpus": 1}
    assert point != Extent.of(hosts=2, gpus=2).point_of_rank(1)
    assert {point: "found"}[Extent.of(hosts=1, gpus=2).point(hosts=0, gpus=1)] == "found"
    assert (point["gpus"], point.get("tp"), {**point}) == (1, None, {"hosts": 0, "gpus": 1})


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_point_outside_of_its_extent_says_so_when_it_is_looked_at(rank: int) -> None:
    point = Point(rank, Extent.of(hosts=2, gpus=4))

    with pytest.raises(IndexError, match=r"expected 0 to 7; the dimensions are {'hosts': 2, 'gpus': 4}"):
        point["gpus"]


@pytest.mark.parametrize(
    ("value", "field"),
    [(Extent.of(a=1), "sizes"), (Extent.of(a=1).point_of_rank(0), "rank"), (region_of(a=1), "offset")],
)
def test_shapes_cannot_be_changed(value: object, field: str) -> None:
    with pytest.raises(AttributeError, match="cannot assign"):
        setattr(value, field, 2)
    assert not hasattr(value, "__dict__")


@pytest.mark.parametrize(
    ("make", "parts", "error", "message"),
    [
        (Extent, (("a", "a"), (1, 2)), ValueError, r"'a' occurs twice in \('a', 'a'\)"),
        (Extent, (("a b",), (1,)), ValueError, r"'a b' in .* cannot name a dimension"),
        (Extent, ((1,), (1,)), ValueError, r"1 in \(1,\) cannot name a dimension"),
        (Extent, (([],), (1,)), ValueError, r"expected names of dimensions, got \(\[\],\)"),
        (Extent, ("ab", (1, 2)), TypeError, r"got the string 'ab'; write \('ab',\)"),
        (Extent, (("a",), (-1,)), ValueError, r"size of dimension 'a': -1 is too small"),
        (Extent, (("a",), (2.0,)), TypeError, r"size of dimension 'a': expected a whole number, got 2\.0"),
        (Extent, (("a", "b"), (1,)), ValueError, r"2 labels \('a', 'b'\) but 1 sizes"),
        (Region, (("a",), 0, (2,), (0,)), ValueError, r"stride of dimension 'a': 0 is too small"),
        (Region, (("a",), -1, (2,), (1,)), ValueError, r"offset: -1 is too small"),
        (Region, (("a", "b"), 0, (2, 2), (1, 2)), ValueError, r"\(1, 2\) do not ascend.*\{'a': 2, 'b': 2\}"),
        (Region, (("a", "b"), 0, (2, 2), (1, 1)), ValueError, r"do not ascend"),
    ],
)
def test_invalid_shapes_cannot_be_made(
    make: Callable[..., object], parts: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(*parts)


def test_a_dimension_given_in_a_mapping_and_by_keyword_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' occurs twice in"):
        Extent.of({"a": 1}, a=2)


def test_views_of_the_same_ranks_are_equal_whatever_led_to_them() -> None:
    region = region_of(hosts=2, gpus=4)

    assert region.slice(gpus=slice(1, 2)) == region.slice(gpus=slice(1, 4, 7))
    assert region.slice(gpus=slice(0, 0)) == region.slice(gpus=slice(3, 1, 2))
    assert hash(region.slice(hosts=1).flatten("x")) == hash(Region(("x",), 4, (4,), (1,)))


def test_slices_take_numpy_integers() -> None:
    region = region_of(hosts=2, gpus=4)

    assert region.slice(hosts=np.int64(1), gpus=slice(np.int8(1), None)) == region.slice(hosts=1, gpus=slice(1, 4))  # type: ignore[arg-type]


def test_evenly_strided_views_can_be_flattened() -> None:
    region = region_of(hosts=3, gpus=4)

    assert region.slice(gpus=slice(1, None, 2)).flatten("x").ranks() == (1, 3, 5, 7, 9, 11)
    assert region.slice(gpus=1).flatten("x").ranks() == (1, 5, 9)
    assert region.slice(hosts=1, gpus=2).flatten("x").ranks() == (6,)
    assert region.slice(gpus=slice(0, 0)).flatten("x").sizes == (0,)
    assert region_of(hosts=0, gpus=2, tp=2).flatten("x").ranks() == ()
    assert Extent.of().region.flatten("x").ranks() == (0,)


def test_the_region_of_a_view_remembers_nothing_when_pickled() -> None:
    region = region_of(hosts=64, gpus=64)
    before = len(pickle.dumps(region))

    region.ranks()

    assert len(pickle.dumps(region)) == before


def test_examples_in_docstrings_run() -> None:
    result = doctest.testmod(shape)

    assert result.attempted > 0
    assert result.failed == 0
