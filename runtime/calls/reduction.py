"""``reduce=``: joins a call's values into one, in rank order."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .value_mesh import ValueMesh


def _least(left: Any, right: Any) -> Any:
    return _elementwise("minimum", min, left, right)


def _greatest(left: Any, right: Any) -> Any:
    return _elementwise("maximum", max, left, right)


def _elementwise(name: str, plain: Callable[..., Any], left: Any, right: Any) -> Any:
    module = type(left).__module__.partition(".")[0]
    if module in {"numpy", "torch"} and getattr(left, "ndim", 0):
        import importlib

        return getattr(importlib.import_module(module), name)(left, right)
    return plain(left, right)


def _joined(left: Any, right: Any) -> Any:
    module = type(left).__module__.partition(".")[0]
    if module not in {"numpy", "torch"}:
        return operator.concat(left, right)
    import importlib

    return importlib.import_module(module).concatenate((left, right))


_NAMED: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "sum": operator.add,
    "prod": operator.mul,
    "min": _least,
    "max": _greatest,
    "and": operator.and_,
    "or": operator.or_,
    "concat": _joined,
}


def reducer(operation: str | Callable[[Any, Any], Any] | None) -> Callable[[ValueMesh[Any]], Any]:
    """Return what turns a ValueMesh into the call's result.

    Args:
        operation: None for the ValueMesh itself; "sum", "mean", "prod", "min", "max", "and", "or" or "concat"; or a
            function of two values, which runs on the thread that asks for the result.

    Raises:
        ValueError: No operation has that name.
    """
    if operation is None:
        return lambda values: values
    join = joiner(operation)
    if operation == "mean":
        return lambda values: _fold(join, values) / len(values)
    return functools.partial(_fold, join)


def joiner(operation: str | Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return the function of two values that an operation repeats: for "mean" it adds.

    Raises:
        ValueError: No operation has that name.
    """
    if callable(operation):
        return operation
    if operation == "mean":
        return operator.add
    if operation not in _NAMED:
        raise ValueError(
            f"reduce={operation!r}: expected one of {', '.join([*_NAMED, 'mean'])}, or a function of two values"
        )
    return _NAMED[operation]


def join_partials(operation: str | Callable[[Any, Any], Any], partials: Sequence[Any], count: int) -> Any:
    """Join what hosts have joined of ``count`` values, in rank order."""
    total = functools.reduce(joiner(operation), partials)
    return total / count if operation == "mean" else total


def _fold(operation: Callable[[Any, Any], Any], values: ValueMesh[Any]) -> Any:
    if not len(values):
        raise ValueError("reduce=: the mesh is empty, there is nothing to join; leave reduce= out, or test len(mesh)")
    return functools.reduce(operation, values)
