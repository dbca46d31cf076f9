"""One finding about this machine, and how findings are shown."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Status(Enum):
    """What a finding means for whoever wants to run Danaus here; the value is the sign shown before it."""

    OK = "ok"
    """As it should be."""
    ABSENT = "--"
    """Something optional is not there."""
    WARNING = "!!"
    """Works, but slower or less far than it could."""
    MISSING = "XX"
    """Danaus does not run without it."""


@dataclass(frozen=True, slots=True)
class Check:
    """A finding: what was looked at, how it is, and what to do about it."""

    name: str
    status: Status
    detail: str
    fix: str | None = None
    """What to do, for whatever is not :attr:`Status.OK`."""

    def as_json(self) -> dict[str, str | None]:
        """Return the finding as plain data."""
        return {"name": self.name, "status": self.status.name.lower(), "detail": self.detail, "fix": self.fix}


def render(checks: Iterable[Check]) -> Iterator[str]:
    """Yield the findings as lines of text, each with its remedy below it."""
    checks = list(checks)
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        yield f"{check.status.value}  {check.name:<{width}}  {check.detail}"
        if check.fix:
            yield f"    {'':<{width}}  -> {check.fix}"
