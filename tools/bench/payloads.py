"""Bytes in and out: arrays and tensors of 1 KiB to 256 MiB each way, every byte summed where it arrives.

Up to 1 MiB the limit is a handover through a shared segment that both sides keep mapped (a copy in, and a message each
way); above, a single copy between warm buffers. The sum is taken off before the comparison: measured on warm memory of
the same process, so that a transfer which leaves page faults to its reader pays for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from . import limits, payload
from .lab import KIB, MIB, Lab, Measure, in_turns, timed, times
from .rows import Goal, Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from .subject import Group

_SIZES: Final = {
    1 * KIB: "1 KiB",
    64 * KIB: "64 KiB",
    MIB: "1 MiB",
    16 * MIB: "16 MiB",
    64 * MIB: "64 MiB",
    256 * MIB: "256 MiB",
}
_HANDOVER_UP_TO: Final = MIB
_COPY_64_MIB_MS: Final = 4.5
_HANDOVER_1_MIB_US: Final = 161.0
_GOALS: Final = {"numpy": Goal(times=2.0), "torch": Goal(times=3.0), "borrowed torch": Goal(times=2.0)}


def _argument_unread() -> Measure:
    row = Row(
        name="argument-1MiB",
        title="1 MiB argument, unread",
        unit="us",
        limit_name="shared segment",
        anchor=_HANDOVER_1_MIB_US,
        goal=Goal(times=2.0),
    )

    def run(lab: Lab) -> None:
        group, array, calls = lab.group(1, torch=True), payload.make("numpy", MIB), lab.effort.calls // 2
        segment = limits.Segment(MIB)
        with limits.closing_all(segment):
            lab.say(row.title)
            samples, limit = in_turns(
                lab.effort.rounds,
                lambda: times(lambda: group.pass_argument(array), calls),
                lambda: segment.times(calls),
            )
        lab.record(row, samples, limit=limit)

    return Measure(name=row.name, rows=(row,), run=run)


def _row(way: str, kind: str, size: int) -> Row:
    text = _SIZES[size]
    small = size <= _HANDOVER_UP_TO
    return Row(
        name=f"{way}-{text}-{kind}".replace(" ", "-"),
        title=f"{text} {kind} {way}, summed",
        unit="us" if small else "ms",
        limit_name="shared segment" if small else "memcpy",
        anchor=_COPY_64_MIB_MS if size == 64 * MIB else None,
        goal=_GOALS[kind] if way == "argument" and size == 64 * MIB else None,
        base_name="the sum",
    )


def _sweep(way: str, kind: str, own_sums: Callable[[Group, str, int, int], list[float]]) -> Measure:
    rows = {size: _row(way, kind, size) for size in _SIZES}
    library = kind.removeprefix("borrowed ")

    def run(lab: Lab) -> None:
        for size in lab.effort.sizes:
            _run_size(lab, rows[size], size)

    def _run_size(lab: Lab, row: Row, size: int) -> None:
        group = lab.group(1, torch=True)
        count = max(3 if lab.effort.thorough else 1, min(50, 8 * MIB // size))
        lab.say(row.title)
        move = _mover(group, way, kind, size)
        segment = limits.Segment(size)
        with limits.closing_all(segment):
            samples, handover, copy, foreign, sums = in_turns(
                min(lab.effort.rounds, 5),
                lambda: times(move, count),
                lambda: segment.times(count),
                lambda: limits.copy_times(size, count + 1)[1:],
                lambda: limits.foreign_read_times(size, count + 1)[1:] if lab.effort.thorough else [],
                lambda: own_sums(group, library, size, count),
            )
        limit = handover if size <= _HANDOVER_UP_TO else copy
        others = {"shared segment": handover, "memcpy": copy, "process_vm_readv": foreign}
        beside = {name: taken for name, taken in others.items() if taken is not limit}
        lab.record(row, samples, limit=limit, base=sums, beside=beside)

    return Measure(name=f"{way}-{kind}".replace(" ", "-"), rows=tuple(rows.values()), run=run)


def _mover(group: Group, way: str, kind: str, size: int) -> Callable[[], object]:
    library = kind.removeprefix("borrowed ")
    own = payload.make(library, size)
    expected = payload.total(own)
    if way == "reply":
        return lambda: _checked(payload.total(group.fetch(library, size)), expected)
    return lambda: _checked(group.sum_argument(own, borrow=kind != library), expected)


def _checked(total: int, expected: int) -> None:
    if total != expected:
        raise RuntimeError(f"the sum of the bytes is {total}, expected {expected}")


def _sums_there(group: Group, kind: str, size: int, count: int) -> list[float]:
    return group.sum_times(kind, size, count + 1)[1:]


def _sums_here(_group: Group, kind: str, size: int, count: int) -> list[float]:
    own: Any = payload.make(kind, size)
    return [timed(lambda: payload.total(own)) for _ in range(count + 1)][1:]


MEASURES: Final = (
    _argument_unread(),
    *(_sweep("argument", kind, _sums_there) for kind in _GOALS),
    *(_sweep("reply", kind, _sums_here) for kind in payload.KINDS),
)
