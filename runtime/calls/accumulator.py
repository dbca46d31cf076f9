"""Folds the replies of a call as they arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .future import Future

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..errors import DanausError
    from ..messages.link import Lane

T = TypeVar("T")


class Accumulator(Generic[T]):
    """Streams a call to all ranks and folds the values, left to right in order of arrival.

    Args:
        endpoint: The endpoint, as in ``mesh.method``.
        identity: Where the fold starts, and its result on an empty mesh.
        combine: ``combine(so_far, value)``; runs on the thread that asks for the result.
    """

    def __init__(self, endpoint: Any, identity: T, combine: Callable[[T, Any], T]) -> None:
        self._endpoint, self._identity, self._combine = endpoint, identity, combine

    def accumulate(self, *args: Any, **kwargs: Any) -> Future[T]:
        """Call every rank; return a future of the folded value, which fails with the first error."""
        arrivals = list(self._endpoint.stream(*args, **kwargs))
        folded: Future[T] = _Folded(f"accumulation over {self._endpoint!r}", arrivals)

        def fold() -> T:
            result = self._identity
            for arrival in arrivals:
                result = self._combine(result, arrival.get())
            return result

        remaining = len(arrivals)
        if not remaining:
            folded._resolve(fold)
        # Replies arrive in the order of the futures, so the last one completes the fold.
        for arrival in arrivals[-1:]:
            arrival._when_done(lambda: folded._resolve(fold))
        return folded


class _Folded(Future[T]):
    """Waits for what the last of its arrivals waits for."""

    __slots__ = ("_arrivals",)

    def __init__(self, describe: str, arrivals: list[Future[Any]]) -> None:
        super().__init__(describe)
        self._arrivals = arrivals

    def _waits_for(self) -> Sequence[tuple[Lane, int]]:
        return self._arrivals[-1]._waits_for()

    def _call_off(self, error: DanausError) -> None:
        self._arrivals[-1]._call_off(error)
