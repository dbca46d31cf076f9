"""Failures beyond the first: seen as fast, told of, repaired by policy."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import TYPE_CHECKING, Any, Final

from . import limits
from .failure import death_time, hidden_reports
from .lab import BUDGET_S, Lab, Measure
from .rows import Goal, Row, median
from .subject import WAIT_S, AbsentError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from ...actors import Trainer

_NUM_FAILURES: Final = 10
_ENOUGH: Final = 3
_RANKS: Final = 4
_WARM_STEPS: Final = 5
_MANY: Final = 1000


def _tenth() -> Measure:
    row = Row(
        name="kill-tenth",
        title="tenth failure in the same mesh",
        unit="ms",
        limit_name="SIGKILL to pidfd",
        anchor=2.0,
        goal=Goal(at_most=5, p99_at_most=15),
    )

    def run(lab: Lab) -> None:
        samples: list[float] = []
        limit: list[float] = []
        nursery = limits.Nursery()
        with limits.closing_all(nursery), hidden_reports():
            for number in _until_budget(max(_ENOUGH, lab.effort.deaths // 4)):
                lab.say(f"{row.title}, {number + 1}")
                limit.append(nursery.kill_time())
                with lab.fresh_group(_NUM_FAILURES + 1) as group:
                    times = [death_time(group, rank) for rank in range(_NUM_FAILURES)]
                samples.append(times[-1])
                lab.record(row, samples, limit=limit)

    return Measure(name=row.name, rows=(row,), run=run)


def _stopped() -> Measure:
    row = Row(name="stop-report", title="SIGSTOP of a proc to the printed report", unit="s", goal=Goal(at_most=2))

    def run(lab: Lab) -> None:
        _only_danaus(lab)
        samples: list[float] = []
        with lab.fresh_group(2) as group:
            pid = group.pids()[1]
            for number in _until_budget(lab.effort.rounds):
                lab.say(f"{row.title}, {number + 1}")
                samples.append(_stop_time(pid))
                lab.record(row, samples)

    return Measure(name=row.name, rows=(row,), run=run)


def _stop_time(pid: int) -> float:
    told = _Watched(f"pid {pid}", "is stuck")
    with redirect_stderr(told):
        start = time.perf_counter()
        os.kill(pid, signal.SIGSTOP)
        try:
            return told.wait_s() - start
        finally:
            os.kill(pid, signal.SIGCONT)
            # Else the next stop is no news.
            told.wait_for("answers again")


def _back() -> Measure:
    row = Row(
        name="restart",
        title="rank killed to the same handle answering, torch imported",
        unit="ms",
        limit_name="SIGKILL to pidfd, then a fork",
        goal=Goal(at_most=300),
    )

    def run(lab: Lab) -> None:
        _only_danaus(lab)
        from ...runtime import Restart, this_host
        from .actors import Probe

        samples: list[float] = []
        limit: list[float] = []
        nursery = limits.Nursery("torch")
        procs = this_host().spawn_procs({"p": 3}, name="bench", preload=("torch",), restart=Restart(max_restarts=_MANY))
        with limits.closing_all(nursery), hidden_reports(), procs:
            probe = procs.spawn("probes", Probe).slice(p=1)
            pid: int = probe.pid.call_one().get(timeout=WAIT_S)
            for number in _until_budget(lab.effort.deaths):
                lab.say(f"{row.title}, {number + 1}")
                limit.append(nursery.kill_time() + nursery.fork_time(1))
                start = time.perf_counter()
                os.kill(pid, signal.SIGKILL)
                pid = _again(lambda: probe.pid.call_one().get(timeout=WAIT_S))
                samples.append(time.perf_counter() - start)
                lab.record(row, samples, limit=limit)

    return Measure(name=row.name, rows=(row,), run=run)


def _training() -> Measure:
    row = Row(
        name="train-loss",
        title="training: rank killed to the next completed step, less one step",
        unit="s",
        goal=Goal(at_most=1),
    )

    def run(lab: Lab) -> None:
        _only_danaus(lab)
        samples: list[float] = []
        steps: list[float] = []
        with hidden_reports(), _trainers() as trainers:
            pids = _pids(trainers)
            for number in _until_budget(lab.effort.rounds):
                lab.say(f"{row.title}, {number + 1}")
                step_s = median([_step_time(trainers) for _ in range(_WARM_STEPS)])
                loss_s, pids = _loss_time(trainers, pids, victim=number % _RANKS)
                steps.append(step_s)
                samples.append(max(loss_s - step_s, 0.0))
                lab.record(row, samples, beside={"one step": steps})

    return Measure(name=row.name, rows=(row,), run=run)


@contextmanager
def _trainers() -> Generator[Trainer]:
    try:
        from ...actors import TrainConfig, Trainer, make_corpus
        from ...actors.models import tiny
    except ImportError as error:
        raise AbsentError(f"needs torch: {error}") from None
    from ...runtime import Restart, this_host

    config = TrainConfig(model=tiny(), seq_len=32, batch_size=_RANKS * 2)
    corpus = make_corpus(["to be or not to be, that is the question. " * 400])
    policy = Restart(max_restarts=_MANY)
    with this_host().spawn_procs({"dp": _RANKS}, name="bench", preload=Trainer.PRELOAD, restart=policy) as procs:
        trainers = procs.spawn("trainers", Trainer, config, corpus)
        _step_time(trainers)
        yield trainers


def _step_time(trainers: Trainer) -> float:
    start = time.perf_counter()
    trainers.step.call().get(timeout=WAIT_S)
    return time.perf_counter() - start


def _loss_time(trainers: Trainer, pids: list[int], *, victim: int) -> tuple[float, list[int]]:
    """Kill a rank in the middle of a step; return the seconds until that step is done, and the processes now.

    Raises:
        RuntimeError: A rank that was not killed has been restarted, or the ranks differ.
    """
    target = trainers.slice(dp=(victim + 1) % _RANKS).describe.call_one().get(timeout=WAIT_S).step + 1
    under_way = trainers.step.call(target)
    start = time.perf_counter()
    os.kill(pids[victim], signal.SIGKILL)
    under_way.exception(timeout=WAIT_S)
    _again(lambda: trainers.step.call(target).get(timeout=WAIT_S))
    elapsed = time.perf_counter() - start
    now = _pids(trainers)
    touched = [rank for rank in range(_RANKS) if (now[rank] == pids[rank]) == (rank == victim)]
    if touched:
        raise RuntimeError(f"rank {victim} was killed; of ranks {touched} another process runs than expected")
    if len(set(trainers.state_hash.call().get(timeout=WAIT_S).values())) != 1:
        raise RuntimeError("the replicas differ")
    return elapsed, now


def _pids(trainers: Trainer) -> list[int]:
    return [info.pid for info in trainers.describe.call().get(timeout=WAIT_S).values()]


def _cycle() -> Measure:
    row = Row(name="cycle", title="cycle of blocking calls to the error", unit="s", goal=Goal(at_most=1))

    def run(lab: Lab) -> None:
        _only_danaus(lab)
        from ...runtime import DanausError, this_host
        from .actors import Knot

        samples: list[float] = []
        with this_host().spawn_procs({"p": 2}, name="bench", preload=()) as procs:
            knots = procs.spawn("knots", Knot)
            first, second = knots.slice(p=0), knots.slice(p=1)
            knots.ask.call([]).get(timeout=WAIT_S)
            for number in _until_budget(lab.effort.rounds * 2):
                lab.say(f"{row.title}, {number + 1}")
                start = time.perf_counter()
                error = first.ask.call_one([second, first]).exception(timeout=WAIT_S)
                samples.append(time.perf_counter() - start)
                assert isinstance(error, DanausError), f"two actors that call each other got {error!r}"
                lab.record(row, samples)

    return Measure(name=row.name, rows=(row,), run=run)


class _Watched(StringIO):
    """A stream that says when a text with all of ``words`` was written to it."""

    def __init__(self, *words: str) -> None:
        super().__init__()
        self._words = words
        self._changed = threading.Condition()
        self._at_s: float | None = None

    def write(self, text: str, /) -> int:
        with self._changed:
            length = super().write(text)
            if self._at_s is None and all(word in self.getvalue() for word in self._words):
                self._at_s = time.perf_counter()
            self._changed.notify_all()
            return length

    def wait_s(self) -> float:
        """Wait for that; return when it was (``time.perf_counter``)."""
        with self._changed:
            self._changed.wait_for(lambda: self._at_s is not None, WAIT_S)
            if self._at_s is None:
                raise TimeoutError(f"not told of within {WAIT_S:g} s: {self._words}; but: {self.getvalue()!r}")
            return self._at_s

    def wait_for(self, word: str) -> None:
        """Wait until ``word`` has been written too."""
        with self._changed:
            if not self._changed.wait_for(lambda: word in self.getvalue(), WAIT_S):
                raise TimeoutError(f"not told of within {WAIT_S:g} s: {word!r}; but: {self.getvalue()!r}")


def _only_danaus(lab: Lab) -> None:
    if lab.subject.package != "danaus":
        raise AbsentError("nothing watches for it or repairs it")


def _until_budget(count: int) -> Iterator[int]:
    """Count up to ``count``; past ``BUDGET_S`` only as far as is enough."""
    end = time.perf_counter() + BUDGET_S
    for number in range(count):
        if number >= _ENOUGH and time.perf_counter() > end:
            return
        yield number


def _again(call: Callable[[], Any]) -> Any:
    """Call until a policy has put things right; what is not for a policy is raised."""
    from ...runtime import SupervisionError

    end = time.perf_counter() + WAIT_S
    while True:
        try:
            return call()
        except SupervisionError as error:
            if not error.failure.restarts or time.perf_counter() > end:
                raise


MEASURES: Final = (_tenth(), _stopped(), _back(), _training(), _cycle())
