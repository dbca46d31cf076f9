"""What host, proc, actor and value meshes have in common: named dimensions, and views along them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .dimensions import unknown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

    from .shape import Extent, Index, Region


class MeshTrait:
    """An n-d array with named dimensions. A view shares everything with its mesh; making one sends no message.

    A subclass holds its region and says how a view of itself is made.

    >>> from danaus import Extent, ValueMesh
    >>> mesh = ValueMesh(Extent.of(hosts=2, gpus=3), "abcdef")
    >>> list(mesh.slice(gpus=2))
    ['c', 'f']
    >>> mesh.slice(hosts=0).split(gpus=("tp", "pp"), pp=1).sizes
    {'tp': 3, 'pp': 1}
    >>> mesh.slice(rack=0)
    Traceback (most recent call last):
    TypeError: slice: no dimension 'rack'; the dimensions are {'hosts': 2, 'gpus': 3}
    """

    __slots__ = ()

    _region: Region

    def _with_region(self, region: Region) -> Self:
        """Return this mesh seen through another region of the same base mesh."""
        raise NotImplementedError

    @property
    def extent(self) -> Extent:
        """Labels and sizes of the dimensions; without any it has one element."""
        return self._region.extent

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the dimensions, outermost first."""
        return self._region.labels

    @property
    def ndim(self) -> int:
        """How many dimensions there are."""
        return len(self._region.labels)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each dimension by its label, outermost first."""
        return dict(zip(self._region.labels, self._region.sizes, strict=True))

    def size(self, dim: str | Sequence[str] | None = None) -> int:
        """Return the size of one dimension, the product of several, or the number of elements.

        Raises:
            KeyError: A dimension is unknown; the message lists those there are.
        """
        if dim is None:
            return self._region.nelements
        dims, sizes = ((dim,) if isinstance(dim, str) else tuple(dim)), self.sizes
        if any(label not in sizes for label in dims):
            raise KeyError(unknown("size", dims, self._region.labels, self._region.sizes))
        return math.prod(sizes[label] for label in dims)

    def slice(self, /, **dims: Index) -> Self:
        """Return the part picked by an index or a slice for each named dimension.

        An int drops the dimension, a slice keeps it and is clipped to its size as in Python: ``slice(hosts=0,
        gpus=slice(0, None, 2))``.

        Raises:
            TypeError: A dimension is unknown, or its index is neither int nor slice.
            IndexError: An index is negative or out of range, or a slice counts from the end.
            ValueError: A slice's step is not positive.
        """
        return self._with_region(self._region.slice(**dims))

    def split(self, /, **dims: int | Sequence[str]) -> Self:
        """Factor dimensions into several: ``split(hosts=("dp", "pp"), pp=2)``.

        Args:
            **dims: For a dimension its new labels, outermost first; for a new label its size. In each dimension at most
                one size may be left out.

        Raises:
            TypeError: A dimension is unknown, or a size is given for a label that no dimension is split into.
            ValueError: The sizes do not multiply to the dimension's size, more than one is left out, or a label would
                occur twice.
        """
        return self._with_region(self._region.split(**dims))

    def flatten(self, name: str) -> Self:
        """Return all elements, in rank order, along one dimension called ``name``.

        Raises:
            ValueError: This is a slice whose ranks are not evenly spaced in the mesh, or ``name`` is no identifier.
        """
        return self._with_region(self._region.flatten(name))

    def rename(self, /, **names: str) -> Self:
        """Return the same elements under other labels: ``rename(old="new")``; labels may be swapped.

        Raises:
            TypeError: A dimension is unknown.
            ValueError: A new label is no identifier or would occur twice.
        """
        return self._with_region(self._region.rename(**names))

    def __len__(self) -> int:
        return self._region.nelements

    def __iter__(self) -> Iterator[Self]:
        """Yield each element as a mesh without dimensions, in rank order."""
        return map(self._with_region, self._region.members())
