"""One row of the table: what was measured of a case, and how that compares with the goals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .machine import stamp

if TYPE_CHECKING:
    from .case import Case

OURS = "triton"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The result of a case; times are medians."""

    name: str
    shape: str
    unit: str
    work: float
    good: float | None
    top: float | None
    baseline: str
    times_us: dict[str, float] = field(default_factory=dict)
    """By variant, those that could be timed."""
    absent: dict[str, str] = field(default_factory=dict)
    """Why the others could not."""
    problem: str = ""
    """What is wrong with our own result; then nothing of it is reported."""
    measured: str = ""
    """Day, device and versions; empty where nothing was measured."""

    @classmethod
    def of(cls, case: Case, times_us: dict[str, float], absent: dict[str, str]) -> Row:
        """Return the row of a case that was timed now."""
        return cls(**_sizes(case), times_us=times_us, absent=absent, measured=stamp())

    @classmethod
    def not_measured(cls, case: Case) -> Row:
        """Return the row of a case for which there was no GPU."""
        return cls(**_sizes(case))

    @classmethod
    def failed(cls, case: Case, problem: str) -> Row:
        """Return the row of a case whose result is wrong or whose kernel raised."""
        return cls(**_sizes(case), problem=problem, measured=stamp())

    def value(self, variant: str) -> float | None:
        """Return a variant's number in the row's unit, None where it has none."""
        time_us = self.times_us.get(variant)
        if time_us is None:
            return None
        if self.unit != "x":
            return self.work / time_us / 1e6
        base_us = self.times_us.get(self.baseline)
        return None if base_us is None else base_us / time_us

    def verdict(self) -> str:
        """Return "top", "good" or "below" for a measured row with goals."""
        value = self.value(OURS)
        if value is None or self.good is None:
            return ""
        if self.top is not None and value >= self.top:
            return "top"
        return "good" if value >= self.good else "below"


def _sizes(case: Case) -> dict[str, Any]:
    names = ("name", "shape", "unit", "work", "good", "top", "baseline")
    return {name: getattr(case, name) for name in names}
