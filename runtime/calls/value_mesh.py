"""Values with one element per rank: what ``call`` returns, sliced like the mesh that was called."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..shapes.mesh_trait import MeshTrait
from ..shapes.shape import Extent, Point, Region

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

R = TypeVar("R", covariant=True)


class _Cell:
    """One element: a value, or the reply that it is loaded from, once, by the first thread that looks at it."""

    __slots__ = ("_load", "_lock", "_value")

    def __init__(self, load: Callable[[], Any] | None, value: Any = None) -> None:
        self._load, self._value = load, value
        self._lock = None if load is None else threading.Lock()

    def get(self) -> Any:
        lock = self._lock
        if lock is not None:
            with lock:
                if self._load is not None:
                    try:
                        self._value = self._load()
                        self._load = None
                    except Exception as error:
                        # A reply's buffers can be opened once, so the next to look gets the same error.
                        self._load = partial(_raise, error)
                        raise
        return self._value


def _raise(error: Exception) -> Any:
    raise error


class ValueMesh(MeshTrait, Generic[R]):
    """An n-d array of values with named dimensions, loaded when looked at.

    Iterating gives values in rank order; ``items()`` gives (point, value).
    """

    def __init__(self, extent: Extent, values: Sequence[R]) -> None:
        if len(values) != extent.nelements:
            raise ValueError(f"ValueMesh: {len(values)} values for an extent of {extent.nelements} ({extent})")
        self._region = extent.region
        self._cells = [_Cell(None, value) for value in values]

    @classmethod
    def _lazy(cls, region: Region, loads: Sequence[Callable[[], Any]]) -> ValueMesh[Any]:
        mesh = cls.__new__(cls)
        mesh._region = region.extent.region
        mesh._cells = [_Cell(load) for load in loads]
        return mesh

    @classmethod
    def from_indexed(cls, extent: Extent, items: Iterable[tuple[int, R]]) -> ValueMesh[R]:
        """Build from (rank, value) pairs in any order; every rank of ``extent`` exactly once."""
        pairs = list(items)
        by_rank = dict(pairs)
        missing = [rank for rank in range(extent.nelements) if rank not in by_rank]
        if missing or len(pairs) != extent.nelements:
            raise ValueError(
                f"ValueMesh.from_indexed: expected ranks 0 to {extent.nelements - 1} once each; missing {missing}"
            )
        return cls(extent, [by_rank[rank] for rank in range(extent.nelements)])

    def _with_region(self, region: Region) -> ValueMesh[R]:
        mesh = ValueMesh.__new__(ValueMesh)
        mesh._region, mesh._cells = region, self._cells
        return mesh

    def get(self, rank: int) -> R:
        """Return the value of one rank of this mesh, counted row-major."""
        return self._cells[self._region.rank_at(rank)].get()

    def item(self, **coords: int) -> R:
        """Return one value by its coordinates; every dimension has to be given."""
        point = self.extent.point(**coords)
        return self.get(point.rank)

    def items(self) -> Iterator[tuple[Point, R]]:
        """Yield (point, value) in rank order."""
        extent = self.extent
        for rank, value in enumerate(self.values()):
            yield Point(rank, extent), value

    def values(self) -> Iterator[R]:
        """Yield the values in rank order."""
        for base_rank in self._region.ranks():
            yield self._cells[base_rank].get()

    def __iter__(self) -> Iterator[R]:  # type: ignore[override]
        return self.values()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ValueMesh):
            return NotImplemented
        return self.extent == other.extent and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return ValueMesh, (self.extent, list(self.values()))

    def __repr__(self) -> str:
        inner = ", ".join(f"{point}: {value!r}" for point, value in self.items())
        return f"ValueMesh({inner})"
