"""Decides which ranks a mesh, or a view of one, has: extents, points and regions.

A region is to a mesh what an array's view is to its buffer: an offset and one stride per dimension, over the ranks of
the *base* mesh that was spawned. Two invariants hold for every region:

* Its ranks ascend in row-major order (a stride is larger than the span of all dimensions after it), so the index of a
  base rank is found by division and never by search.
* It is canonical: a dimension with at most one index has stride 1, an empty region has offset 0. Two regions with equal
  labels, sizes and ranks are therefore equal.

>>> from danaus import Extent
>>> region = Extent.of(hosts=2, gpus=4).region.slice(gpus=slice(1, None, 2))
>>> region.ranks()
(1, 3, 5, 7)
>>> region.point_of(5)
{'hosts': 1/2, 'gpus': 0/2}
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from . import strides as views
from .dimensions import (
    as_int,
    as_ints,
    as_labels,
    checked_index,
    checked_rank,
    described,
    factors,
    picked,
    split_plan,
    unknown,
)

Index: TypeAlias = "int | slice[Any, Any, Any]"
"""What picks a part of a dimension: an int drops the dimension, a slice keeps it."""

_set = object.__setattr__


@dataclass(frozen=True, slots=True, repr=False)
class Extent:
    """The dimensions of a mesh: their labels and sizes, outermost first.

    A mapping from label to size (``extent["gpus"]``, ``dict(extent)``) that iterates over its points in rank order;
    ``len`` counts dimensions, ``nelements`` points. Without dimensions it has one point; with a size of 0 it has none.

    >>> from danaus import Extent
    >>> extent = Extent.of(hosts=2, gpus=4)
    >>> extent.point(hosts=1, gpus=2).rank
    6
    >>> extent["gpus"], "gpus" in extent, extent.nelements
    (4, True, 8)

    Raises:
        ValueError: A label is no identifier or occurs twice, a size is negative, or their numbers differ.
        TypeError: A size is no whole number.
    """

    labels: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        _set(self, "labels", as_labels(self.labels))
        _set(self, "sizes", as_ints("size", self.labels, self.sizes, least=0))

    @classmethod
    def of(cls, sizes: Mapping[str, int] | None = None, /, **more: int) -> Extent:
        """Build an extent from a mapping, from keyword arguments, or from both."""
        first = sizes or {}
        return cls((*first, *more), (*first.values(), *more.values()))

    @property
    def nelements(self) -> int:
        """How many points there are."""
        return math.prod(self.sizes)

    @property
    def region(self) -> Region:
        """All ranks of a mesh of this extent."""
        return _view(self.labels, 0, self.sizes, views.dense(self.sizes))

    def point(self, /, **coords: int) -> Point:
        """Return the point at these coordinates, one for each dimension.

        Raises:
            TypeError: A dimension is missing or unknown, or its coordinate is no whole number.
            IndexError: A coordinate is negative or out of range.
        """
        if len(coords) != len(self.labels) or any(label not in coords for label in self.labels):
            wrong = ", ".join(f"{label}={coord!r}" for label, coord in coords.items())
            raise TypeError(f"point({wrong}): give one index for each dimension; {described(self.labels, self.sizes)}")
        rank = 0
        for label, size in zip(self.labels, self.sizes, strict=True):
            rank = rank * size + checked_index("point", label, coords[label], size)
        return Point(rank, self)

    def point_of_rank(self, rank: int) -> Point:
        """Return the point with this row-major number.

        Raises:
            IndexError: ``rank`` is negative or out of range.
        """
        return Point(checked_rank("point_of_rank", rank, self.labels, self.sizes, self.nelements), self)

    def keys(self) -> tuple[str, ...]:
        """Labels, as a mapping has them: ``dict(extent)`` maps labels to sizes."""
        return self.labels

    def items(self) -> Iterator[tuple[str, int]]:
        """Yield (label, size), outermost first."""
        return zip(self.labels, self.sizes, strict=True)

    def __getitem__(self, label: str) -> int:
        try:
            return self.sizes[self.labels.index(label)]
        except ValueError:
            raise KeyError(unknown("extent", [label], self.labels, self.sizes)) from None

    def __contains__(self, item: object) -> bool:
        """Tell whether ``item`` is a label of this extent or a point in it."""
        if isinstance(item, Point):
            return item.extent == self and 0 <= item.rank < self.nelements
        return item in self.labels

    def __iter__(self) -> Iterator[Point]:
        return (Point(rank, self) for rank in range(self.nelements))

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[Any, ...]:
        return Extent, (self.labels, self.sizes)

    def __str__(self) -> str:
        return str(dict(self.items()))

    def __repr__(self) -> str:
        return f"Extent.of({', '.join(f'{label}={size}' for label, size in self.items())})"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Point(Mapping[str, int]):
    """One coordinate in an extent: a mapping from label to index.

    Equal to another point of the same rank and extent, and to any other mapping with the same items. Made for each
    message, so the rank is not checked against the extent until a coordinate is asked for; prefer
    :meth:`Extent.point_of_rank`, which checks.

    >>> from danaus import Extent
    >>> Extent.of(hosts=2, gpus=4).point_of_rank(6)
    {'hosts': 1/2, 'gpus': 2/4}

    Attributes:
        rank: Row-major number in ``extent``.
        extent: The dimensions.
    """

    rank: int
    extent: Extent

    def _indices(self) -> list[int]:
        rest, indices = self.rank, list[int]()
        for size in reversed(self.extent.sizes):
            if not size:
                break
            rest, index = divmod(rest, size)
            indices.append(index)
        if rest or len(indices) != len(self.extent.sizes):
            checked_rank("Point", self.rank, self.extent.labels, self.extent.sizes, self.extent.nelements)
        return indices[::-1]

    def __getitem__(self, label: str) -> int:
        labels = self.extent.labels
        if label not in labels:
            raise KeyError(unknown("point", [label], labels, self.extent.sizes))
        return self._indices()[labels.index(label)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.extent.labels)

    def __len__(self) -> int:
        return len(self.extent.labels)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Point):
            return self.rank == other.rank and self.extent == other.extent
        return Mapping.__eq__(self, other)

    def __hash__(self) -> int:
        return hash((self.rank, self.extent))

    def __reduce__(self) -> tuple[Any, ...]:
        return Point, (self.rank, self.extent)

    def __repr__(self) -> str:
        parts = zip(self.extent.labels, self._indices(), self.extent.sizes, strict=True)
        return "{" + ", ".join(f"{label!r}: {index}/{size}" for label, index, size in parts) + "}"


@dataclass(frozen=True, slots=True)
class Region:
    """A strided view of a base mesh's ranks, with dimensions of its own. Views of views are views of the base mesh.

    ``rank in region`` asks for a base rank.

    >>> from danaus import Extent
    >>> mesh = Extent.of(hosts=4, gpus=2).region
    >>> mesh.split(hosts=("dp", "pp"), pp=2).slice(pp=1).ranks()
    (2, 3, 6, 7)
    >>> mesh.slice(gpus=1).flatten("rank").strides
    (2,)

    Raises:
        ValueError: A label is no identifier or occurs twice, the numbers of labels, sizes and strides differ, one of
            them is negative, or the ranks do not ascend in row-major order.
        TypeError: A number is no whole number.
    """

    labels: tuple[str, ...]
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    _extent: Extent | None = field(default=None, init=False, repr=False, compare=False)
    _ranks: tuple[int, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        labels = as_labels(self.labels)
        offset = as_int("offset", self.offset, least=0)
        sizes = as_ints("size", labels, self.sizes, least=0)
        strides = as_ints("stride", labels, self.strides, least=1)
        if not views.is_ascending(sizes, strides):
            raise ValueError(
                f"Region: strides {strides} do not ascend in row-major order; {described(labels, sizes)}. "
                "Each stride has to be larger than the span of all dimensions after it"
            )
        _set(self, "labels", labels)
        for name, value in zip(("offset", "sizes", "strides"), views.canonical(offset, sizes, strides), strict=True):
            _set(self, name, value)

    @property
    def extent(self) -> Extent:
        """Labels and sizes, without the ranks."""
        extent = self._extent
        if extent is None:
            extent = _extent(self.labels, self.sizes)
            _set(self, "_extent", extent)
        return extent

    @property
    def nelements(self) -> int:
        """How many ranks there are."""
        return math.prod(self.sizes)

    @property
    def is_dense(self) -> bool:
        """Whether the base ranks are consecutive numbers."""
        return self.strides == views.dense(self.sizes)

    def ranks(self) -> tuple[int, ...]:
        """Return the base ranks in row-major order, which is ascending. Computed once."""
        ranks = self._ranks
        if ranks is None:
            ranks = views.all_ranks(self.offset, self.sizes, self.strides)
            _set(self, "_ranks", ranks)
        return ranks

    def members(self) -> Iterator[Region]:
        """Yield each rank as a region without dimensions, in row-major order."""
        return (_view((), rank, (), ()) for rank in self.ranks())

    def rank_at(self, index: int) -> int:
        """Return the base rank of the member with this row-major number in the region.

        Raises:
            IndexError: ``index`` is negative or out of range.
        """
        ranks = self._ranks
        if ranks is not None and 0 <= index < len(ranks):
            return ranks[index]
        index = checked_rank("rank_at", index, self.labels, self.sizes, self.nelements)
        return views.rank_at(self.offset, self.sizes, self.strides, index)

    def index_of(self, base_rank: int) -> int:
        """Return the row-major number in the region of the member with this base rank.

        Raises:
            ValueError: The base rank is not in this region.
        """
        index = self._find(base_rank)
        if index is None:
            raise ValueError(f"index_of({base_rank}): not in this region; {self._described()}")
        return index

    def point_of(self, base_rank: int) -> Point:
        """Return the point in this region's extent of the member with this base rank.

        Raises:
            ValueError: The base rank is not in this region.
        """
        return Point(self.index_of(base_rank), self.extent)

    def _find(self, base_rank: int) -> int | None:
        return views.find(self.offset, self.sizes, self.strides, base_rank)

    def __contains__(self, base_rank: object) -> bool:
        return isinstance(base_rank, int) and self._find(base_rank) is not None

    def slice(self, /, **dims: Index) -> Region:
        """Return the part picked along some dimensions; the rules and errors are those of :meth:`.MeshTrait.slice`."""
        offset, unused = self.offset, len(dims)
        labels, sizes, strides = list[str](), list[int](), list[int]()
        for label, size, stride in zip(self.labels, self.sizes, self.strides, strict=True):
            if label in dims:
                unused -= 1
                index = dims[label]
                if not isinstance(index, slice):
                    offset += stride * checked_index("slice", label, index, size)
                    continue
                part = picked(label, index, size)
                offset += stride * part.start
                size, stride = len(part), stride * part.step  # noqa: PLW2901  normalised in place
            labels.append(label)
            sizes.append(size)
            strides.append(stride)
        if unused:
            raise TypeError(unknown("slice", dims, self.labels, self.sizes))
        return _view(tuple(labels), offset, tuple(sizes), tuple(strides))

    def split(self, /, **dims: int | Sequence[str]) -> Region:
        """Factor dimensions into several; the rules and errors are those of :meth:`.MeshTrait.split`."""
        groups, given = split_plan(dims, self.labels, self.sizes)
        labels, sizes, strides = list[str](), list[int](), list[int]()
        for label, size, stride in zip(self.labels, self.sizes, self.strides, strict=True):
            names = groups.get(label, (label,))
            parts = factors(label, size, names, given) if label in groups else (size,)
            labels += names
            sizes += parts
            strides += views.split_stride(stride, parts)
        return _view(as_labels(labels), self.offset, tuple(sizes), tuple(strides))

    def flatten(self, name: str) -> Region:
        """Return the same ranks along one dimension; the errors are those of :meth:`.MeshTrait.flatten`."""
        stride, gap = views.flat_stride(self.sizes, self.strides)
        if gap is not None:
            outer, inner = (self.labels[place] for place in gap)
            raise ValueError(
                f"flatten({name!r}): the ranks are not evenly spaced between {outer!r} and {inner!r}; "
                f"{self._described()}. Flatten before slicing, or slice {outer!r} or {inner!r} down to one index first"
            )
        return _view(as_labels((name,)), self.offset, (self.nelements,), (stride,))

    def rename(self, /, **names: str) -> Region:
        """Return the same ranks under other labels; the errors are those of :meth:`.MeshTrait.rename`."""
        if any(label not in self.labels for label in names):
            raise TypeError(unknown("rename", names, self.labels, self.sizes))
        labels = as_labels(names.get(label, label) for label in self.labels)
        return _view(labels, self.offset, self.sizes, self.strides)

    def _described(self) -> str:
        ranks = f"ranks {self.rank_at(0)} to {self.rank_at(self.nelements - 1)}" if self.nelements else "no ranks"
        return f"{described(self.labels, self.sizes)}, {ranks}"

    def __reduce__(self) -> tuple[Any, ...]:
        return Region, (self.labels, self.offset, self.sizes, self.strides)


def _view(labels: tuple[str, ...], offset: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Region:
    """Make a region of what is known to be valid; slicing is in users' hot loops, and checks are most of its cost."""
    offset, sizes, strides = views.canonical(offset, sizes, strides)
    region = object.__new__(Region)
    _set(region, "labels", labels)
    _set(region, "offset", offset)
    _set(region, "sizes", sizes)
    _set(region, "strides", strides)
    _set(region, "_extent", None)
    _set(region, "_ranks", None)
    return region


def _extent(labels: tuple[str, ...], sizes: tuple[int, ...]) -> Extent:
    extent = object.__new__(Extent)
    _set(extent, "labels", labels)
    _set(extent, "sizes", sizes)
    return extent
