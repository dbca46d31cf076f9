"""Checks what users say about dimensions: labels, sizes, indices, how to split.

An error about a dimension names the dimensions there are, so that it can be mended without looking them up.
"""

from __future__ import annotations

import keyword
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, SupportsIndex, cast


def described(labels: Sequence[str], sizes: Sequence[int]) -> str:
    """Return the sentence that ends every error about a dimension."""
    if not labels:
        return "there are no dimensions"
    listed = ", ".join(f"{label!r}: {size}" for label, size in zip(labels, sizes, strict=True))
    return f"the dimensions are {{{listed}}}"


def unknown(call: str, asked: Iterable[object], labels: Sequence[str], sizes: Sequence[int]) -> str:
    """Return the message for labels of which at least one does not exist."""
    missing = ", ".join(repr(label) for label in asked if label not in labels)
    return f"{call}: no dimension {missing}; {described(labels, sizes)}"


@lru_cache(maxsize=1024)
def checked_labels(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return ``labels`` if each is an identifier and none occurs twice.

    Raises:
        ValueError: They are not.
    """
    for label in labels:
        if not (isinstance(cast("object", label), str) and label.isidentifier()) or keyword.iskeyword(label):
            raise ValueError(
                f"{label!r} in {labels} cannot name a dimension, because dimensions are passed as keyword arguments; "
                "use letters, digits and underscores, not starting with a digit"
            )
        if labels.count(label) > 1:
            raise ValueError(f"dimension {label!r} occurs twice in {labels}; rename one of them")
    return labels


def as_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return checked labels as a tuple.

    Raises:
        ValueError: A label is no identifier or occurs twice.
        TypeError: ``labels`` is one string instead of a sequence of them.
    """
    if isinstance(labels, str):
        raise TypeError(f"labels: expected a sequence of names, got the string {labels!r}; write ({labels!r},)")
    labels = tuple(labels)
    try:
        return checked_labels(labels)
    except TypeError:
        raise ValueError(f"labels: expected names of dimensions, got {labels!r}") from None


def as_int(what: str, value: SupportsIndex, *, least: int) -> int:
    """Return ``value`` as an int of at least ``least``; ``what`` names it in errors.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is smaller.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{what}: expected a whole number, got {value!r}") from None
    if number < least:
        raise ValueError(f"{what}: {number} is too small; expected {least} or more")
    return number


def as_ints(what: str, labels: tuple[str, ...], values: Iterable[SupportsIndex], *, least: int) -> tuple[int, ...]:
    """Return one int of at least ``least`` per label.

    Raises:
        TypeError: One is no whole number.
        ValueError: One is smaller, or there is not one for each label.
    """
    values = tuple(values)
    if len(values) != len(labels):
        raise ValueError(f"{len(labels)} labels {labels} but {len(values)} {what}s {values}; give one for each")
    return tuple(
        # the first half is all that happens to good values, which come with every message
        value if type(value) is int and value >= least else as_int(f"{what} of dimension {label!r}", value, least=least)
        for label, value in zip(labels, values, strict=True)
    )


def checked_index(call: str, label: str, index: Any, size: int) -> int:
    """Return ``index`` as an int if it picks one of ``size``.

    Raises:
        TypeError: It is no whole number.
        IndexError: It is negative or out of range.
    """
    try:
        number = operator.index(index)
    except TypeError:
        raise TypeError(f"{call}({label}={index!r}): expected an int or a slice for dimension {label!r}") from None
    if 0 <= number < size:
        return number
    if size == 0:
        raise IndexError(f"{call}({label}={number}): dimension {label!r} has size 0, so no index exists")
    hint = f"; negative indices do not count from the end here, the last one is {size - 1}" if number < 0 else ""
    raise IndexError(f"{call}({label}={number}): dimension {label!r} has size {size}, indices 0 to {size - 1}{hint}")


def checked_rank(call: str, rank: SupportsIndex, labels: Sequence[str], sizes: Sequence[int], nelements: int) -> int:
    """Return ``rank`` as an int if there are more than ``rank`` elements.

    Raises:
        TypeError: It is no whole number.
        IndexError: It is negative or out of range.
    """
    try:
        number = operator.index(rank)
    except TypeError:
        raise TypeError(f"{call}({rank!r}): expected a rank, a whole number") from None
    if not 0 <= number < nelements:
        limits = f"expected 0 to {nelements - 1}" if nelements else "there are no ranks"
        raise IndexError(f"{call}({number}): {limits}; {described(labels, sizes)}")
    return number


def picked(label: str, part: slice[Any, Any, Any], size: int) -> range:
    """Return the indices that a slice picks of ``size``, clipped as Python does.

    Raises:
        TypeError: A bound is no whole number.
        IndexError: A bound is negative.
        ValueError: The step is not positive.
    """
    for name, bound in (("start", part.start), ("stop", part.stop), ("step", part.step)):
        if bound is None:
            continue
        try:
            number = operator.index(bound)
        except TypeError:
            raise TypeError(f"slice({label}={part}): {name} {bound!r} is no whole number") from None
        if name == "step" and number <= 0:
            raise ValueError(f"slice({label}={part}): the step has to be 1 or more, meshes keep their order")
        if number < 0:
            raise IndexError(
                f"slice({label}={part}): negative bounds do not count from the end here; "
                f"dimension {label!r} has size {size}, bounds 0 to {size}"
            )
    return range(*part.indices(size))


def split_plan(
    dims: Mapping[str, int | Sequence[str]], labels: Sequence[str], sizes: Sequence[int]
) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
    """Sort what ``split`` was given into new labels by dimension and sizes by new label.

    Raises:
        TypeError: A dimension is unknown, or a size is given for a label that no dimension is split into.
        ValueError: A size is negative, or a dimension gets no new label.
    """
    groups = dict[str, tuple[str, ...]]()
    given = dict[str, int]()
    for label, value in dims.items():
        if isinstance(value, str):
            raise TypeError(f"split({label}={value!r}): expected a tuple of new labels; write {label}=({value!r}, ...)")
        if not isinstance(value, Sequence):
            given[label] = as_int(f"split({label}={value!r})", value, least=0)
        elif not value:
            raise ValueError(f"split({label}=()): give at least one new label; slice({label}=0) drops a dimension")
        else:
            groups[label] = tuple(value)
    if any(label not in labels for label in groups):
        raise TypeError(unknown("split", groups, labels, sizes))
    new = [name for names in groups.values() for name in names]
    for label in given:
        if label not in new:
            raise TypeError(
                f"split: a size is given for {label!r}, but the new dimensions are {new}; {described(labels, sizes)}"
            )
    return groups, given


def factors(label: str, size: int, names: tuple[str, ...], given: Mapping[str, int]) -> tuple[int, ...]:
    """Return the sizes of the dimensions ``names`` that a dimension of ``size`` is split into.

    Raises:
        ValueError: More than one size is left out, or they do not multiply to ``size``.
    """
    open_names = [name for name in names if name not in given]
    known = 1
    for name in names:
        known *= given.get(name, 1)
    call = f"split({label}={names})"
    if len(open_names) > 1:
        raise ValueError(f"{call}: sizes of {open_names} are missing; give all but one of them, as {open_names[-1]}=2")
    if not open_names and known != size:
        raise ValueError(f"{call}: the new sizes multiply to {known}, dimension {label!r} has size {size}")
    if open_names and (known == 0 or size % known):
        raise ValueError(
            f"{call}: dimension {label!r} has size {size}, which is no multiple of {known}; "
            f"the size of {open_names[0]!r} cannot be inferred"
        )
    return tuple(given[name] if name in given else size // known for name in names)
