"""Generators on many ranks: one item of each rank at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from .item_stream import bind_streams
from .value_mesh import ValueMesh

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from ..shapes.shape import Extent
    from .item_stream import ItemStream

R = TypeVar("R")


class LockstepStream(Generic[R]):
    """What ``call`` returns for a generator endpoint: ValueMeshes, until the first rank's generator ends or fails."""

    def __init__(self, extent: Extent, streams: Sequence[ItemStream[R]]) -> None:
        self._extent, self._streams = extent, streams
        bind_streams(streams)

    def __iter__(self) -> Iterator[ValueMesh[R]]:
        return self

    def __next__(self) -> ValueMesh[R]:
        if not self._streams:
            raise StopIteration
        try:
            return ValueMesh(self._extent, [next(stream) for stream in self._streams])
        except BaseException:
            self.close()
            raise

    def __aiter__(self) -> AsyncIterator[ValueMesh[R]]:
        return self

    async def __anext__(self) -> ValueMesh[R]:
        if not self._streams:
            raise StopAsyncIteration
        try:
            return ValueMesh(self._extent, [await anext(stream) for stream in self._streams])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every rank's generator."""
        for stream in self._streams:
            stream.close()
