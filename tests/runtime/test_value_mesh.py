"""Values with one element per rank: addressed and sliced like the mesh, loaded when looked at, once."""

from __future__ import annotations

import pickle
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danaus.runtime.calls.value_mesh import ValueMesh
from danaus.runtime.shapes.shape import Extent

# A busy machine is no reason to fail.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

TWO_BY_THREE = Extent.of(hosts=2, gpus=3)


def letters() -> ValueMesh[str]:
    return ValueMesh(TWO_BY_THREE, "abcdef")


class Loads:
    """Makes the loaders of a lazy mesh, and counts who was loaded."""

    def __init__(self, extent: Extent = TWO_BY_THREE) -> None:
        self.counts: Counter[int] = Counter()
        self.mesh = ValueMesh._lazy(
            extent.region, [lambda rank=rank: self.load(rank) for rank in range(extent.nelements)]
        )

    def load(self, rank: int) -> int:
        self.counts[rank] += 1
        return rank * 10


def test_values_are_addressed_by_coordinates_and_by_rank() -> None:
    mesh = letters()

    assert mesh.item(hosts=1, gpus=2) == mesh.get(5) == "f"
    assert mesh.item(gpus=1, hosts=0) == mesh.get(1) == "b"


def test_items_come_in_rank_order_with_their_points() -> None:
    items = list(letters().items())

    assert [value for _, value in items] == list("abcdef")
    assert [(point.rank, dict(point)) for point, _ in items][4] == (4, {"hosts": 1, "gpus": 1})


def test_iterating_gives_values_in_rank_order() -> None:
    assert list(letters()) == list(letters().values()) == list("abcdef")
    assert len(letters()) == 6


@pytest.mark.parametrize("coords", [{"hosts": 2, "gpus": 0}, {"hosts": 0, "gpus": -1}])
def test_a_coordinate_that_does_not_exist_is_refused(coords: dict[str, int]) -> None:
    with pytest.raises(IndexError, match=r"hosts|gpus"):
        letters().item(**coords)


@pytest.mark.parametrize("coords", [{"hosts": 0}, {"hosts": 0, "gpus": 0, "x": 0}, {}, {"host": 0, "gpus": 0}])
def test_coordinates_that_do_not_name_every_dimension_are_refused_with_those_there_are(coords: dict[str, int]) -> None:
    with pytest.raises(TypeError, match=r"hosts.*gpus"):
        letters().item(**coords)


@pytest.mark.parametrize("rank", [6, -1])
def test_a_rank_that_does_not_exist_is_refused(rank: int) -> None:
    with pytest.raises(IndexError):
        letters().get(rank)


@UNHURRIED
@given(st.lists(st.integers(0, 4), max_size=3), st.data())
def test_slices_have_the_values_that_numpy_finds(sizes: list[int], data: st.DataObject) -> None:
    labels = ("a", "b", "c")[: len(sizes)]
    array = np.arange(int(np.prod(sizes, dtype=int))).reshape(sizes)
    mesh = ValueMesh(Extent(labels, tuple(sizes)), [int(value) for value in array.flat])
    picks: dict[str, Any] = {}
    for label, size in zip(labels, sizes, strict=True):
        bounds = st.integers(0, 4)
        options = [st.just(slice(None)), st.builds(slice, bounds, bounds, st.integers(1, 3))]
        picks[label] = data.draw(st.one_of(options + ([st.integers(0, size - 1)] if size else [])))

    part = mesh.slice(**picks)

    expected = array[tuple(picks.values())]
    assert list(part) == list(expected.flat)
    assert part.extent.sizes == expected.shape
    for rank, (point, value) in enumerate(part.items()):
        assert part.item(**point) == part.get(rank) == expected[tuple(point.values())] == value


def test_a_slice_of_a_slice_addresses_the_same_values() -> None:
    part = letters().slice(gpus=slice(1, None)).slice(hosts=1)

    assert list(part) == ["e", "f"]
    assert part.item(gpus=0) == "e"
    assert part.flatten("x").item(x=1) == "f"


def test_a_mesh_without_dimensions_has_one_value() -> None:
    mesh = letters().slice(hosts=1, gpus=0)

    assert (mesh.item(), list(mesh), len(mesh)) == ("d", ["d"], 1)
    assert ValueMesh(Extent((), ()), [7]).item() == 7


def test_an_empty_mesh_has_none() -> None:
    assert list(ValueMesh(Extent.of(x=0), [])) == []


# loading


def test_nothing_is_loaded_until_it_is_looked_at() -> None:
    loads = Loads()
    part = loads.mesh.slice(hosts=1)
    assert (len(part), dict(loads.counts)) == (3, {})

    assert part.item(gpus=1) == 40
    assert loads.counts == {4: 1}


def test_slices_share_what_was_loaded() -> None:
    loads = Loads()
    part = loads.mesh.slice(gpus=0)

    assert list(part) == [0, 30]
    assert list(loads.mesh) == [0, 10, 20, 30, 40, 50]
    assert list(part) == [0, 30]
    assert set(loads.counts.values()) == {1}


def test_many_threads_load_a_value_once() -> None:
    is_loaded_twice = threading.Event()
    loads: list[int] = []

    def load() -> object:
        loads.append(1)
        if len(loads) > 1:
            is_loaded_twice.set()
        # Long enough for every other thread to come here, if any could.
        is_loaded_twice.wait(0.2)
        return object()

    mesh = ValueMesh._lazy(Extent.of(x=1).region, [load])
    values: list[Any] = []
    threads = [threading.Thread(target=lambda: values.append(mesh.get(0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert len(loads) == 1
    assert len(values) == 4
    assert len({id(value) for value in values}) == 1


def test_a_value_may_be_none_and_is_still_loaded_once() -> None:
    loads: list[int] = []
    mesh = ValueMesh._lazy(Extent.of(x=1).region, [lambda: loads.append(1)])

    assert [mesh.get(0), mesh.get(0)] == [None, None]
    assert loads == [1]


def test_a_value_that_cannot_be_loaded_raises_the_same_at_each_look_and_is_loaded_once() -> None:
    loads: list[int] = []

    def load() -> None:
        loads.append(1)
        raise ZeroDivisionError("no")

    mesh = ValueMesh._lazy(Extent.of(x=2).region, [load, lambda: 7])

    for _ in range(3):
        with pytest.raises(ZeroDivisionError, match="no"):
            mesh.get(0)
    assert mesh.get(1) == 7
    assert loads == [1]


def test_loading_one_value_may_look_at_another() -> None:
    mesh = ValueMesh._lazy(Extent.of(x=2).region, [lambda: mesh.get(1) + 1, lambda: 7])

    assert list(mesh) == [8, 7]


def test_a_slice_of_the_called_mesh_keeps_its_own_ranks() -> None:
    region = Extent.of(hosts=2, gpus=3).region.slice(hosts=1)
    mesh = ValueMesh._lazy(region, [lambda rank=rank: rank for rank in range(3)])

    assert list(mesh) == [0, 1, 2]
    assert mesh.item(gpus=2) == 2


# as a value


def test_pickling_loads_and_keeps_shape_and_values() -> None:
    loads = Loads()
    copy = pickle.loads(pickle.dumps(loads.mesh))

    assert copy == loads.mesh
    assert copy.item(hosts=1, gpus=0) == 30


def test_a_pickled_slice_has_its_values_alone() -> None:
    loads = Loads()
    part = loads.mesh.slice(gpus=slice(0, None, 2))

    copy = pickle.loads(pickle.dumps(part))

    assert (list(copy), copy.extent) == ([0, 20, 30, 50], Extent.of(hosts=2, gpus=2))
    assert sorted(loads.counts) == [0, 2, 3, 5]
    assert copy == part


def test_meshes_are_equal_when_shape_and_values_are() -> None:
    assert letters() == ValueMesh(TWO_BY_THREE, list("abcdef"))
    assert letters() != ValueMesh(TWO_BY_THREE, "abcdeX")
    assert letters() != ValueMesh(Extent.of(gpus=3, hosts=2), "abcdef")
    assert letters() != list("abcdef")


def test_a_mesh_of_values_is_not_hashable() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(letters())


def test_the_text_shows_points_and_values() -> None:
    assert repr(ValueMesh(Extent.of(x=2), "ab")) == "ValueMesh({'x': 0/2}: 'a', {'x': 1/2}: 'b')"


@pytest.mark.parametrize("count", [0, 5, 7])
def test_as_many_values_as_ranks_are_needed(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} values for an extent of 6"):
        ValueMesh(TWO_BY_THREE, range(count))


def test_a_mesh_is_built_from_ranks_in_any_order() -> None:
    assert list(ValueMesh.from_indexed(Extent.of(x=3), [(2, "c"), (0, "a"), (1, "b")])) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "items", [[(0, "a")], [(0, "a"), (1, "b"), (2, "c")], [(0, "a"), (0, "x"), (1, "b")], [(1, "a"), (-1, "b")]]
)
def test_a_mesh_is_built_from_each_rank_exactly_once(items: list[tuple[int, str]]) -> None:
    with pytest.raises(ValueError, match="expected ranks 0 to 1 once each"):
        ValueMesh.from_indexed(Extent.of(x=2), items)
