"""Ranks and hosts that a training run is to lose, each at a point of a step: drawn from a seed, and what came of it."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from danaus import testing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from danaus.actors import Trainer

POINTS: Final = ("data", "forward", "backward", "all_reduce", "optimizer", "checkpoint")
"""Where a step can be cut short; see :class:`danaus.actors.Replica`."""

_FIRED_LIMIT_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Loss:
    """One rank to kill at one point of one step; or the host that it is on, which has to be a daemon here."""

    rank: int
    point: str
    step: int
    with_host: bool = False

    def __str__(self) -> str:
        host = "the host of " if self.with_host else ""
        return f"{host}rank {self.rank} at {self.point!r} of step {self.step}"


def draw_losses(seed: int, num: int, *, ranks: int, steps: int, save_every: int) -> list[Loss]:
    """Return ``num`` random losses in different steps, every point as often as the others if there is room.

    Raises:
        ValueError: There are not enough steps, after a first one that is left alone.
    """
    choose = random.Random(seed)  # noqa: S311  nobody has to be unable to guess it
    free = set(range(2, steps + 1))
    losses: list[Loss] = []
    points: list[str] = []
    for _ in range(num):
        points = points or choose.sample(POINTS, len(POINTS))
        point = points.pop()
        saved = [step for step in free if step % save_every == 0 or step == steps]
        if point == "checkpoint" and not saved:
            point = choose.choice(POINTS[:-1])
        candidates = saved if point == "checkpoint" else free
        if not candidates:
            raise ValueError(f"{num} losses need as many steps, after the first; there are {steps} steps")
        step = choose.choice(sorted(candidates))
        free.remove(step)
        losses.append(Loss(choose.randrange(ranks), point, step))
    return sorted(losses, key=lambda loss: loss.step)


class Saboteur:
    """Has ranks killed as planned.

    Args:
        losses: The plan; at most one per step.
    """

    def __init__(self, losses: Iterable[Loss]) -> None:
        self._planned = {loss.step: loss for loss in losses}
        self._injections: list[testing.Injection] = []
        self._threads: list[threading.Thread] = []

    def prepare(self, trainers: Trainer, step: int) -> Loss | None:
        """Arm what is planned for ``step``, which is the next to be completed; return it the first time."""
        loss = self._planned.pop(step, None)
        if loss is not None:
            strike = testing.Fault.hang if loss.with_host else testing.Fault.kill
            injection = testing.inject(trainers, strike(rank=loss.rank, point=loss.point, step=step))
            self._injections.append(injection)
            if loss.with_host:
                thread = threading.Thread(target=_end_host_once_fired, args=(injection,), name="end-of-a-host")
                self._threads.append(thread)
                thread.start()
        return loss

    @property
    def fired(self) -> list[testing.Fired]:
        """What has struck so far."""
        return [fired for injection in self._injections for fired in injection.fired]

    def stop(self) -> None:
        """Take back what has not struck."""
        for injection in self._injections:
            injection.withdraw()
        for thread in self._threads:
            thread.join()

    def table(self) -> str:
        """Return how many ranks were killed at each point."""
        kills = Counter(fired.fault.point for fired in self.fired)
        return f"killed {kills.total()} ranks, at: " + ", ".join(f"{point} {kills[point]}" for point in POINTS)


def _end_host_once_fired(injection: testing.Injection) -> None:
    """Kill the daemon and the agent above the process that hangs, as an end of their machine would."""
    (fired,) = injection.wait_fired(timeout=_FIRED_LIMIT_S)
    agent = _parent(fired.pid)
    daemon = _parent(agent)
    for pid in (daemon, agent):
        os.kill(pid, signal.SIGKILL)


def _parent(pid: int) -> int:
    status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    # The name before it, in parentheses, may hold anything.
    return int(status.rpartition(")")[2].split()[1])
