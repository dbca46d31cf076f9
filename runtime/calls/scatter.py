"""Per-rank arguments: ``scatter(values)`` gives each rank its own element."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..shapes.shape import Extent
    from .value_mesh import ValueMesh

T = TypeVar("T")


class Scatter(Generic[T]):
    """Marks an argument of which each rank gets its own element."""

    __slots__ = ("values",)

    def __init__(self, values: Any) -> None:
        self.values = values

    def __reduce__(self) -> Any:
        raise TypeError("scatter(...) has to be an argument of the call itself, not a part of one")


def scatter(values: Sequence[T] | ValueMesh[T]) -> T:
    """Mark a list, or a ValueMesh of the called mesh's shape, so that each rank gets its own element.

    The result is typed as one element, since that is what the endpoint sees.
    """
    return Scatter(values)  # type: ignore[return-value]


def scattered(
    args: tuple[Any, ...], kwargs: dict[str, Any], extent: Extent, num_ranks: int
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return each rank's own (args, kwargs).

    Raises:
        TypeError: A scattered argument has no elements.
        ValueError: A scattered argument has not one element per rank.
    """
    columns = [_column(f"argument {index}", value, extent, num_ranks) for index, value in enumerate(args)]
    named = {name: _column(name, value, extent, num_ranks) for name, value in kwargs.items()}
    return [
        (tuple(column[rank] for column in columns), {name: column[rank] for name, column in named.items()})
        for rank in range(num_ranks)
    ]


def _column(name: str, value: Any, extent: Extent, num_ranks: int) -> Sequence[Any]:
    if type(value) is not Scatter:
        return [value] * num_ranks
    from .value_mesh import ValueMesh

    values = value.values
    if not isinstance(values, Iterable):
        raise TypeError(f"scatter({name}): expected a list or a ValueMesh, one element for each rank; got {values!r}")
    if isinstance(values, ValueMesh) and values.extent.sizes != extent.sizes:
        raise ValueError(f"scatter({name}): the ValueMesh has shape {values.extent}, the called mesh {extent}")
    column = list(values)
    if len(column) != num_ranks:
        raise ValueError(f"scatter({name}): {len(column)} elements for {num_ranks} ranks {extent}; give one for each")
    return column
