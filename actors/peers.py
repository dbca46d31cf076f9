"""Brings the replicas of a training run to one state: at the start, and whenever one of them was lost.

Every forming of the process group is a new generation, and its ranks meet before they do anything else in it: each
tells how far it is, and whoever is behind takes the state of a rank that is not (agreement.py has the rules). What was
reported of the last step, and the result of its evaluation, go with the state, so that who completed them before the
loss need not be asked again. Within a generation nothing is exchanged but what training needs.
"""

from __future__ import annotations

import math
from dataclasses import astuple, fields
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..runtime.testing import point
from .agreement import NUM_NUMBERS, Kind, LoadCheckpoint, Report, Transfer, Work, decide
from .checkpoints import newest_checkpoint, newest_step
from .replica import Replica, StepMetrics

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_NOTHING = Work()
_WHOLE = {"step", "num_tokens", "memory_bytes"}


class StepCompletedError(ValueError):
    """A step was asked for that lies before the last completed one; on all ranks alike."""

    def __init__(self, asked: int, done: int) -> None:
        super().__init__(asked, done)
        self.asked, self.done = asked, done

    def __str__(self) -> str:
        return (
            f"step({self.asked}): step {self.done} is completed already; ask for step({self.done + 1}) or a later one"
        )


class SupersededError(RuntimeError):
    """The other ranks have come together for something that was called later."""

    def __init__(self, mine: Work, latest: Work) -> None:
        super().__init__(mine, latest)
        self.mine, self.latest = mine, latest

    def __str__(self) -> str:
        return f"this call ({_words(self.mine)}) is out of date: other ranks were called later ({_words(self.latest)})"


class Peers:
    """One rank's dealings with the others.

    Args:
        replica: This rank's copy of the run.
        checkpoints: Folder whose newest checkpoint is the state to begin with, and to go on with when no rank has one.
        exact: Refuse a checkpoint of another run; otherwise only model and tokenizer have to be the same.
    """

    def __init__(self, replica: Replica, *, checkpoints: str | Path | None = None, exact: bool = True) -> None:
        self.replica, self.checkpoints, self.exact = replica, checkpoints, exact
        self._met: int | None = None
        self._held_out: float | None = None
        self._held_out_step = -1

    def meet(self, group: dist.ProcessGroup | None, generation: int, work: Work = _NOTHING) -> None:
        """Have the state that all other ranks have, and be about to do the same; at once where that is so already.

        Blocks until all ranks of a new generation are here.

        Args:
            group: All ranks; None where this is the only one.
            generation: Number of the group's forming; any constant for None.
            work: What this rank has come for.

        Raises:
            SupersededError: The others have come for something that was called later.
            NothingSoundError: No rank has a state to go on with.
            OSError: The newest checkpoint cannot be read. Other ranks get a RuntimeError.
            ValueError: It is of another run, or does not fit. Other ranks get a RuntimeError.
            RuntimeError: A collective failed; the next generation meets again.
        """
        if self._met == generation and (group is not None or self.replica.state.is_sound):
            return
        while True:
            plan = self._come_together(group, work)
            if plan.is_common:
                break
            mine = plan.works[self.replica.rank]
            if mine != plan.work:
                # the next call comes back, and those who stay in the loop wait for it
                if mine.kind is not Kind.NOTHING:
                    raise SupersededError(mine, plan.work)
                return
        self._met = generation

    def step(self, group: dist.ProcessGroup | None, target: int | None = None) -> StepMetrics:
        """Train until ``target`` steps are completed, by default one more; return what was reported of the last.

        Asked again for the step that is the last completed one, it only returns that report. All ranks have met.

        Raises:
            StepCompletedError: A later step than ``target`` is completed, or there is no report of it.
            Exception: What :meth:`Replica.step` raises.
        """
        replica = self.replica
        goal = replica.state.step + 1 if target is None else target
        while replica.state.step < goal:
            replica.step(group)
        if replica.last is None or replica.last.step != goal:
            raise StepCompletedError(goal, replica.state.step)
        return replica.last

    def evaluate(self, group: dist.ProcessGroup | None) -> float:
        """Return the mean loss per token on held-out text, computed once for a state. All ranks have met."""
        step = self.replica.state.step
        if self._held_out is None or self._held_out_step != step:
            self._held_out, self._held_out_step = self.replica.evaluate(group), step
        return self._held_out

    def load(
        self, group: dist.ProcessGroup | None, path: str | Path, *, rank: int = 0, exact: bool = True
    ) -> Exception | None:
        """Have rank ``rank`` read a checkpoint, which all ranks take at their next meeting. All ranks have met.

        Returns:
            Where it cannot be read, is of another run or does not fit: the error, and on other ranks a RuntimeError.
        """
        self._met = self._held_out = None
        error = self._load_on(group, rank, path, exact=exact)
        self.replica.state.lineage += error is None and self.replica.rank == rank
        return error

    def _come_together(self, group: dist.ProcessGroup | None, work: Work) -> Transfer:
        plan, rows = self._compare(group, work)
        if isinstance(plan, LoadCheckpoint):
            newest = None if self.checkpoints is None else newest_checkpoint(self.checkpoints)
            error = self._load_on(group, plan.rank, newest or f"{self.checkpoints}/step {plan.step}", exact=self.exact)
            if error is not None:
                raise error
            plan, rows = self._compare(group, work)
        assert isinstance(plan, Transfer), "the checkpoint just loaded is ahead of a replica that is not trained"
        self._hand_over(group, plan)
        if self.replica.rank in plan.sources:
            self.replica.last = _metrics(rows[plan.sources[self.replica.rank]])
        self._held_out, self._held_out_step = None, plan.place[1]
        if plan.evaluated_by is not None:
            self._held_out = rows[plan.evaluated_by][-1]
        return plan

    def _compare(
        self, group: dist.ProcessGroup | None, work: Work
    ) -> tuple[LoadCheckpoint | Transfer, list[list[float]]]:
        state, last = self.replica.state, self.replica.last
        checkpoint_step = 0 if self.checkpoints is None else newest_step(self.checkpoints)
        is_evaluated = self._held_out is not None and self._held_out_step == state.step
        report = Report(state.lineage, state.step, state.is_sound, checkpoint_step, is_evaluated, work)
        metrics: Sequence[float] = [math.nan] * len(fields(StepMetrics)) if last is None else astuple(last)
        held_out = math.nan if self._held_out is None else self._held_out
        rows = _gather(group, [*report.to_numbers(), *metrics, held_out])
        return decide([Report.from_numbers(row[:NUM_NUMBERS]) for row in rows]), rows

    def _load_on(
        self, group: dist.ProcessGroup | None, rank: int, path: str | Path, *, exact: bool
    ) -> Exception | None:
        error = None
        if self.replica.rank == rank:
            try:
                self.replica.load(path, exact=exact)
            except (OSError, ValueError) as raised:
                error = raised
        if not any(row[0] for row in _gather(group, [error is not None])):
            return None
        return error or RuntimeError(f"rank {rank} could not load the checkpoint {path}; its own error says why")

    def _hand_over(self, group: dist.ProcessGroup | None, plan: Transfer) -> None:
        if group is None or not plan.sources:
            return
        point("recover")
        rank, state = self.replica.rank, self.replica.state
        if rank in plan.sources:
            state.receive(group, plan.sources[rank], place=plan.place)
        else:
            state.send(group, [other for other, source in plan.sources.items() if source == rank])


def _metrics(row: Sequence[float]) -> StepMetrics | None:
    """Return the metrics in one rank's row; None where it had none."""
    names = [each.name for each in fields(StepMetrics)]
    values = dict(zip(names, row[NUM_NUMBERS:-1], strict=True))
    if math.isnan(values["step"]):
        return None
    return StepMetrics(**{name: int(value) if name in _WHOLE else value for name, value in values.items()})  # pyright: ignore[reportArgumentType]


def _gather(group: dist.ProcessGroup | None, row: Sequence[float]) -> list[list[float]]:
    """Return the rows of all ranks, in rank order."""
    if group is None:
        return [list(row)]
    own = torch.tensor(row, dtype=torch.float64)
    rows = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(rows, own, group=group)
    return [each.tolist() for each in rows]


def _words(work: Work) -> str:
    return "none" if work.kind is Kind.NOTHING else f"{work.kind.name.lower()} {work.step}"
