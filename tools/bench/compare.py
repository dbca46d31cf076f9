"""Finds what became slower between two records of the benchmark. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .rows import Judgement, Result, Row, Verdict, judge

if TYPE_CHECKING:
    from collections.abc import Sequence

RATIO_TOLERANCE: Final = 1.2
"""Ratios to a limit hold from day to day, so a fifth is a change."""
FIGURE_TOLERANCE: Final = 1.4
"""Absolute figures drift by a third with the machine."""


@dataclass(frozen=True, slots=True)
class Regression:
    """A row that became worse by ``factor``, in its ratio to the limit or, without a limit, in itself."""

    row: Row
    old: float
    new: float
    factor: float
    unit: str

    def __str__(self) -> str:
        return f"{self.row.title}: {self.old:.3g} -> {self.new:.3g} {self.unit} ({self.factor:.2f} times worse)"


def regressions(old: Sequence[tuple[Row, Result]], new: Sequence[tuple[Row, Result]]) -> list[Regression]:
    """Return the rows of ``new`` that are worse than in ``old``, the worst first; void and missing rows are skipped."""
    before = {row.name: judge(row, result) for row, result in old}
    found = [
        regression
        for row, result in new
        if (past := before.get(row.name)) is not None
        and (regression := _compare(row, past, judge(row, result))) is not None
    ]
    return sorted(found, key=lambda each: each.factor, reverse=True)


def _compare(row: Row, old: Judgement, new: Judgement) -> Regression | None:
    if Verdict.VOID in {old.verdict, new.verdict}:
        return None
    pairs = ((old.ratio, new.ratio, "x", RATIO_TOLERANCE), (old.p50, new.p50, row.unit, FIGURE_TOLERANCE))
    for before, after, unit, tolerance in pairs:
        if before and after:
            factor = before / after if row.more_is_better else after / before
            return Regression(row, before, after, factor, unit) if factor > tolerance else None
    return None
