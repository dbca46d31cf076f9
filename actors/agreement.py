"""Decides how the ranks of a training run come together again after one of them was lost.

Pure logic: the reports of all ranks go in, what each of them has to do comes out, equal on every rank.

A collective is not atomic: of two survivors, one may have completed the step in which the other lost a rank. So ranks
compare the last step that each has completed, and the highest wins: those behind, and those just started, take the
state of a rank that is at it. Doing the step again on all of them would give the same state, but not to a rank whose
update was cut short, and not without the rank that may be gone by then.

Reports also name the work that a rank has come for. A call which was under way when the rank was lost may reach this
point on one rank while the others are here for the next call already; whoever came for something older steps aside.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Kind(IntEnum):
    """What a rank has come for; of two at one step, the higher one is called later."""

    NOTHING = 0
    """Nothing that needs the others, once all have the same state."""
    STEP = 1
    EVALUATE = 2


@dataclass(frozen=True, slots=True)
class Work:
    """What a rank has come for.

    Attributes:
        kind: What it is.
        step: STEP: the number of completed steps to reach, 0 for one more. Else 0.
    """

    kind: Kind = Kind.NOTHING
    step: int = 0

    def left(self, done: int, *, is_evaluated: bool = False) -> Work:
        """Return what is left to do together once ``done`` steps are completed, and the last of them evaluated."""
        if self.kind is Kind.STEP:
            target = self.step or done + 1
            return Work(Kind.STEP, target) if target > done else Work()
        if self.kind is Kind.EVALUATE and not is_evaluated:
            return Work(Kind.EVALUATE, done)
        return Work()


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank says of itself.

    Attributes:
        lineage: How often the state was replaced by :meth:`Replica.load`; a later lineage wins whatever its step.
        step: Completed steps. A replica that is neither trained nor loaded is at lineage 0, step 0.
        is_sound: Whether the state is that after ``step`` steps; not while it is overwritten, or where that failed.
        checkpoint_step: Step of the newest checkpoint that this rank can read; 0 for none.
        is_evaluated: Whether the rank has the result of an evaluation of this state.
        work: What the rank has come for.
    """

    lineage: int
    step: int
    is_sound: bool = True
    checkpoint_step: int = 0
    is_evaluated: bool = False
    work: Work = Work()

    @property
    def place(self) -> tuple[int, int]:
        """How far the state is; below that of any state where it is unsound."""
        return (self.lineage, self.step) if self.is_sound else (-1, -1)

    def to_numbers(self) -> list[int]:
        """Return the report as ``NUM_NUMBERS`` whole numbers, for a tensor."""
        flags = [self.is_sound, self.checkpoint_step, self.is_evaluated]
        return [self.lineage, self.step, *flags, self.work.kind, self.work.step]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> Report:
        """Return the report that :meth:`to_numbers` made them of."""
        lineage, step, is_sound, checkpoint_step, is_evaluated, kind, work_step = map(int, numbers)
        return cls(lineage, step, bool(is_sound), checkpoint_step, bool(is_evaluated), Work(Kind(kind), work_step))


NUM_NUMBERS = 7


@dataclass(frozen=True, slots=True)
class LoadCheckpoint:
    """No rank has more than the state before the first step: ``rank`` reads its checkpoint, then all report again."""

    rank: int
    step: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """The state of the ranks at the highest step goes to the others.

    Attributes:
        place: Lineage and step of the state that counts.
        sources: From which rank each rank that is behind takes it. Empty where all are equal already.
        evaluated_by: A rank that has the result of an evaluation of that state; None where nobody has.
        works: What is left of what each rank has come for.
    """

    place: tuple[int, int]
    sources: dict[int, int]
    evaluated_by: int | None
    works: tuple[Work, ...]

    @property
    def work(self) -> Work:
        """What is to be done next: the latest that any of the ranks has come for."""
        return max(self.works, key=lambda work: (work.step, work.kind))

    @property
    def is_common(self) -> bool:
        """Whether all ranks have come for that."""
        return all(work == self.work for work in self.works)


class NothingSoundError(RuntimeError):
    """No rank has a state that could be gone on with."""

    def __init__(self) -> None:
        super().__init__(
            "the update of the only replica was cut short and there is no checkpoint to take its state from: call "
            "load(path), or spawn the trainers with checkpoints=DIRECTORY and save() there"
        )


def decide(reports: Sequence[Report]) -> LoadCheckpoint | Transfer:
    """Return what the ranks have to do, from their reports in rank order.

    Raises:
        NothingSoundError: No state is sound, and there is no checkpoint.
    """
    best = max(report.place for report in reports)
    if best <= (0, 0):
        newest = max(report.checkpoint_step for report in reports)
        if newest > 0:
            return LoadCheckpoint(
                next(r for r, report in enumerate(reports) if report.checkpoint_step == newest), newest
            )
        if best < (0, 0):
            raise NothingSoundError
    ahead = [rank for rank, report in enumerate(reports) if report.place == best]
    behind = [rank for rank, report in enumerate(reports) if report.place != best]
    # each of those ahead serves its part of those behind
    sources = {rank: ahead[number % len(ahead)] for number, rank in enumerate(behind)}
    evaluated_by = next((rank for rank in ahead if reports[rank].is_evaluated), None)
    works = tuple(report.work.left(best[1], is_evaluated=evaluated_by is not None) for report in reports)
    return Transfer(best, sources, evaluated_by, works)
