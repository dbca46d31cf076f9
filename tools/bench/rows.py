"""What a row of the benchmark is: its unit, its goal, and the verdict that its samples earn. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

NOISE: Final = 1.5
"""A row is void where its limit is this many times worse than the one on record."""

UNITS: Final = {"us": 1e6, "ms": 1e3, "s": 1.0, "/s": 1.0, "MiB": 1.0, "GiB": 1 / 1024, "messages": 1.0}
"""What seconds, rates, MiB and counts are multiplied by."""


class Verdict(Enum):
    """What came of a row."""

    REACHED = "reached"
    MISSED = "missed"
    VOID = "void"
    """The machine was too noisy to say."""
    FAILED = "failed"
    """The measure raised or timed out."""
    ABSENT = "-"
    """This runtime has no such thing, or the row was not run."""
    MEASURED = ""
    """A figure without a goal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What the median (and the 99th percentile) should reach; every part given must hold."""

    times: float | None = None
    """Of the limit: at most, or at least where more is better."""
    at_most: float | None = None
    p99_at_most: float | None = None
    p99_times_p50: float | None = None

    def __post_init__(self) -> None:
        if (self.times, self.at_most, self.p99_at_most, self.p99_times_p50) == (None, None, None, None):
            raise ValueError("a Goal needs at least one of times, at_most, p99_at_most, p99_times_p50")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    title: str
    unit: str
    limit_name: str = ""
    goal: Goal | None = None
    anchor: float | None = None
    """The limit on record, in the row's unit; without one the row is never void."""
    more_is_better: bool = False
    base_name: str = ""
    """Work that belongs to the row by its nature (summing the bytes) and is taken off before the comparison."""

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"row {self.name}: unit {self.unit!r} is none of {', '.join(UNITS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Raw samples of one row, in its unit, in the order taken."""

    samples: Sequence[float] = ()
    limit: Sequence[float] = ()
    base: Sequence[float] = ()
    beside: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    """Further figures of the same run: other limits, USS beside PSS."""
    error: str = ""
    absent: str = ""
    """Why this runtime cannot run the row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A row's summary."""

    verdict: Verdict
    p50: float | None = None
    p99: float | None = None
    """Of rates the slow end: the 1st percentile."""
    limit: float | None = None
    ratio: float | None = None
    why: str = ""


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return the percentile of ``samples``, interpolated between the two nearest.

    Raises:
        ValueError: There are no samples, or ``percent`` is outside 0 to 100.
    """
    if not samples:
        raise ValueError("percentile of no samples")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be between 0 and 100, got {percent}")
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(samples: Sequence[float]) -> float:
    """Return the 50th percentile."""
    return percentile(samples, 50)


def judge(row: Row, result: Result) -> Judgement:
    """Return the summary and verdict of a row."""
    if result.error:
        return Judgement(verdict=Verdict.FAILED, why=result.error)
    if not result.samples:
        return Judgement(verdict=Verdict.ABSENT, why=result.absent)
    p50 = median(result.samples)
    p99 = percentile(result.samples, 1 if row.more_is_better else 99)
    limit = median(result.limit) if result.limit else None
    base = median(result.base) if result.base else 0.0
    ratio = max(p50 - base, 0.0) / limit if limit else None
    verdict, why = _verdict(row, p50=p50, p99=p99, limit=limit, ratio=ratio)
    return Judgement(verdict=verdict, p50=p50, p99=p99, limit=limit, ratio=ratio, why=why)


def _verdict(row: Row, *, p50: float, p99: float, limit: float | None, ratio: float | None) -> tuple[Verdict, str]:
    if row.anchor is not None and limit is not None and _is_noisy(limit, row):
        why = f"noisy machine: {row.limit_name} {limit:.3g} {row.unit}, on record {row.anchor:.3g}"
        return Verdict.VOID, why
    if row.goal is None:
        return Verdict.MEASURED, ""
    misses = list(_misses(row, row.goal, p50=p50, p99=p99, ratio=ratio))
    return (Verdict.MISSED, "; ".join(misses)) if misses else (Verdict.REACHED, "")


def _is_noisy(limit: float, row: Row) -> bool:
    assert row.anchor is not None
    return limit * NOISE < row.anchor if row.more_is_better else limit > row.anchor * NOISE


def _misses(row: Row, goal: Goal, *, p50: float, p99: float, ratio: float | None) -> list[str]:
    misses: list[str] = []
    if goal.times is not None:
        if ratio is None:
            misses.append("no limit was measured")
        elif row.more_is_better and ratio < goal.times:
            misses.append(f"{ratio:.2f} x, at least {goal.times:g} wanted")
        elif not row.more_is_better and ratio > goal.times:
            misses.append(f"{ratio:.2f} x, at most {goal.times:g} wanted")
    if goal.at_most is not None and p50 > goal.at_most:
        misses.append(f"{p50:.3g} {row.unit}, at most {goal.at_most:g} wanted")
    if goal.p99_at_most is not None and p99 > goal.p99_at_most:
        misses.append(f"p99 {p99:.3g} {row.unit}, at most {goal.p99_at_most:g} wanted")
    if goal.p99_times_p50 is not None and p99 > goal.p99_times_p50 * p50:
        misses.append(f"p99 {p99 / p50:.1f} x its p50, at most {goal.p99_times_p50:g} wanted")
    return misses


def goal_text(row: Row) -> str:
    """Return the goal as the table shows it, as in ``<= 2.5 x, p99 <= 15 ms``."""
    goal = row.goal
    if goal is None:
        return ""
    parts: list[str] = []
    if goal.times is not None:
        parts.append(
            f"{'>=' if row.more_is_better else '<='} {goal.times:g} x"
            + (f" + {row.base_name}" if row.base_name else "")
        )
    if goal.at_most is not None:
        parts.append(f"<= {goal.at_most:g} {row.unit}")
    if goal.p99_at_most is not None:
        parts.append(f"p99 <= {goal.p99_at_most:g} {row.unit}")
    if goal.p99_times_p50 is not None:
        parts.append(f"p99 <= {goal.p99_times_p50:g} x p50")
    return ", ".join(parts)
