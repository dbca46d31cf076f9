"""The face that all meshes share, on the least that a mesh has to be; its ranks are checked in ``test_shape.py``."""

from __future__ import annotations

import doctest
from typing import TYPE_CHECKING, Any

import pytest

from danaus.runtime.shapes import mesh_trait
from danaus.runtime.shapes.mesh_trait import MeshTrait
from danaus.runtime.shapes.shape import Extent, Region

if TYPE_CHECKING:
    from collections.abc import Callable


class PlainMesh(MeshTrait):
    """The least that a mesh has to be: the region, and a way to look through another."""

    def __init__(self, region: Region) -> None:
        self._region = region

    def _with_region(self, region: Region) -> PlainMesh:
        return PlainMesh(region)


def mesh_of(**sizes: int) -> PlainMesh:
    return PlainMesh(Extent.of(sizes).region)


DIMS = r"the dimensions are \{'hosts': 2, 'gpus': 4\}"

MISTAKES: dict[str, tuple[Callable[[Any], object], type[Exception], str]] = {
    "unknown dim": (lambda m: m.slice(gpu=0), TypeError, rf"slice: no dimension 'gpu'; {DIMS}"),
    "two unknown": (lambda m: m.slice(a=0, hosts=0, b=0), TypeError, rf"no dimension 'a', 'b'; {DIMS}"),
    "negative": (lambda m: m.slice(gpus=-1), IndexError, r"'gpus' has size 4, .*the last one is 3"),
    "out of range": (lambda m: m.slice(gpus=4), IndexError, r"slice\(gpus=4\): dimension 'gpus' has size 4"),
    "text as index": (lambda m: m.slice(gpus="0"), TypeError, r"expected an int or a slice for dimension 'gpus'"),
    "negative stop": (lambda m: m.slice(gpus=slice(0, -1)), IndexError, r"'gpus' has size 4"),
    "negative start": (lambda m: m.slice(gpus=slice(-2, None)), IndexError, r"'gpus' has size 4"),
    "step 0": (lambda m: m.slice(gpus=slice(0, 4, 0)), ValueError, r"slice\(gpus=.*step has to be 1 or more"),
    "step -1": (lambda m: m.slice(gpus=slice(None, None, -1)), ValueError, r"step has to be 1 or more"),
    "bound type": (lambda m: m.slice(gpus=slice("a")), TypeError, r"slice\(gpus=.*stop 'a' is no whole number"),
    "split unknown": (lambda m: m.split(gpu=("a", "b"), a=2), TypeError, rf"split: no dimension 'gpu'; {DIMS}"),
    "split size of none": (lambda m: m.split(gpus=("a", "b"), c=2), TypeError, rf"'c'.*\['a', 'b'\]; {DIMS}"),
    "split text": (lambda m: m.split(gpus="ab"), TypeError, r"gpus=\('ab', \.\.\.\)"),
    "split nothing": (lambda m: m.split(gpus=()), ValueError, r"at least one new label"),
    "split open": (lambda m: m.split(gpus=("a", "b")), ValueError, r"sizes of \['a', 'b'\] are missing"),
    "split uneven": (lambda m: m.split(gpus=("a", "b"), a=3), ValueError, r"'gpus' has size 4, .*multiple of 3.*'b'"),
    "split by 0": (lambda m: m.split(gpus=("a", "b"), a=0), ValueError, r"'gpus' has size 4, .*multiple of 0"),
    "split wrong": (lambda m: m.split(gpus=("a", "b"), a=2, b=3), ValueError, r"multiply to 6, .*'gpus' has size 4"),
    "split negative": (lambda m: m.split(gpus=("a", "b"), a=-2), ValueError, r"a=-2.*too small"),
    "split twice": (lambda m: m.split(gpus=("hosts", "b"), b=2), ValueError, r"'hosts' occurs twice in"),
    "rename unknown": (lambda m: m.rename(gpu="x"), TypeError, rf"rename: no dimension 'gpu'; {DIMS}"),
    "rename twice": (lambda m: m.rename(gpus="hosts"), ValueError, r"'hosts' occurs twice in \('hosts', 'hosts'\)"),
    "rename wrong": (lambda m: m.rename(gpus="my gpu"), ValueError, r"'my gpu' in \('hosts', 'my gpu'\) cannot name"),
    "rename keyword": (lambda m: m.rename(gpus="class"), ValueError, r"'class' in .* cannot name"),
    "flatten wrong": (lambda m: m.flatten("1st"), ValueError, r"'1st' in .* cannot name"),
    "flatten strided": (
        lambda m: m.slice(gpus=slice(0, 3)).flatten("x"),
        ValueError,
        r"between 'hosts' and 'gpus'; the dimensions are \{'hosts': 2, 'gpus': 3\}, ranks 0 to 6\. Flatten before",
    ),
    "size unknown": (lambda m: m.size("x"), KeyError, rf"size: no dimension 'x'; {DIMS}"),
    "sizes unknown": (lambda m: m.size(["gpus", "x"]), KeyError, rf"size: no dimension 'x'; {DIMS}"),
    "no dims at all": (lambda m: m.slice(hosts=0, gpus=0).slice(x=0), TypeError, r"there are no dimensions"),
    "no index": (lambda m: m.slice(gpus=slice(0, 0)).slice(gpus=0), IndexError, r"'gpus' has size 0"),
    "extent unknown": (lambda m: m.extent["x"], KeyError, rf"extent: no dimension 'x'; {DIMS}"),
    "point unknown": (lambda m: m.extent.point_of_rank(0)["x"], KeyError, rf"point: no dimension 'x'; {DIMS}"),
    "point short": (lambda m: m.extent.point(gpus=0), TypeError, rf"point\(gpus=0\): give one index for each.*{DIMS}"),
    "point other": (lambda m: m.extent.point(gpus=0, x=0), TypeError, DIMS),
    "point range": (lambda m: m.extent.point(hosts=2, gpus=0), IndexError, r"'hosts' has size 2, indices 0 to 1"),
    "rank range": (lambda m: m.extent.point_of_rank(8), IndexError, rf"expected 0 to 7; {DIMS}"),
    "rank negative": (lambda m: m._region.rank_at(-1), IndexError, rf"expected 0 to 7; {DIMS}"),
    "rank type": (lambda m: m.extent.point_of_rank(0.5), TypeError, r"expected a rank, a whole number"),
    "rank of none": (lambda m: m.slice(gpus=slice(0, 0))._region.rank_at(0), IndexError, r"there are no ranks"),
    "not a member": (lambda m: m._region.index_of(8), ValueError, rf"index_of\(8\).*{DIMS}, ranks 0 to 7"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_name_the_dimensions_there_are(mistake: str) -> None:
    make, error, message = MISTAKES[mistake]

    with pytest.raises(error, match=message):
        make(mesh_of(hosts=2, gpus=4))


def test_slices_clip_as_python_does() -> None:
    mesh = mesh_of(gpus=4)

    assert mesh.slice(gpus=slice(2, 9)).sizes == {"gpus": 2}
    assert mesh.slice(gpus=slice(3, 1)).sizes == {"gpus": 0}
    assert mesh.slice(gpus=slice(None, None, 10**12)).sizes == {"gpus": 1}


def test_a_dimension_may_be_called_self() -> None:
    assert mesh_of(self=3).rename(self="cls").slice(cls=1).extent == Extent.of()
    assert Extent.of(self=3).point(self=2).rank == 2


def test_labels_can_be_swapped() -> None:
    assert mesh_of(hosts=2, gpus=4).rename(hosts="gpus", gpus="hosts").sizes == {"gpus": 2, "hosts": 4}


def test_a_dimension_of_size_zero_can_be_split() -> None:
    assert mesh_of(gpus=0).split(gpus=("a", "b"), a=2).sizes == {"a": 2, "b": 0}


def test_a_split_may_keep_the_name_of_the_dimension() -> None:
    assert mesh_of(gpus=8).split(gpus=("hosts", "gpus"), hosts=2).sizes == {"hosts": 2, "gpus": 4}


def test_size_counts_one_dimension_several_or_all() -> None:
    mesh = mesh_of(hosts=2, gpus=4, tp=3)

    assert (mesh.size("gpus"), mesh.size(["hosts", "tp"]), mesh.size(()), mesh.size()) == (4, 6, 1, 24)
    assert (len(mesh), mesh.ndim, mesh.labels) == (24, 3, ("hosts", "gpus", "tp"))
    assert mesh.extent == Extent.of(hosts=2, gpus=4, tp=3)


def test_a_mesh_without_dimensions_has_one_element() -> None:
    mesh = mesh_of(hosts=2).slice(hosts=1)

    assert (len(mesh), mesh.ndim, mesh.sizes, str(mesh.extent)) == (1, 0, {}, "{}")
    assert [part._region.ranks() for part in mesh] == [(1,)]


def test_iterating_a_mesh_gives_each_element_as_a_mesh_in_rank_order() -> None:
    parts = list(mesh_of(hosts=2, gpus=4).slice(gpus=slice(1, None, 2)))

    assert [part._region.ranks() for part in parts] == [(1,), (3,), (5,), (7,)]
    assert {part.extent for part in parts} == {Extent.of()}


def test_examples_in_docstrings_run() -> None:
    result = doctest.testmod(mesh_trait)

    assert result.attempted > 0
    assert result.failed == 0
