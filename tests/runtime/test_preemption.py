"""A host that is told to end: actors drain, the owner hears of it, and the ranks move, or the mesh goes on without."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from danaus import Actor, FailureKind, Restart, SupervisionError, checkpoint, endpoint, shutdown_context, this_host

from .restarting import LIMIT_S, Events, retried

if TYPE_CHECKING:
    from collections.abc import Iterator


class Saver(Actor):
    """Counts, and saves its count only when its host is about to be taken away."""

    def __init__(self, folder: str) -> None:
        self.folder, self.count = folder, 0

    def restore(self, count: int) -> None:
        self.count = count

    def __drain__(self, seconds: float) -> None:
        checkpoint(self.count)
        Path(self.folder, f"drained-{os.getpid()}").write_text(str(seconds))

    @endpoint
    def pid(self) -> int:
        return os.getpid()

    @endpoint
    async def wait(self) -> None:
        await asyncio.Event().wait()

    @endpoint
    def add(self) -> int:
        self.count += 1
        return self.count


class AsyncSaver(Saver):
    async def __drain__(self, seconds: float) -> None:  # type: ignore[override]
        super().__drain__(seconds)


class Stubborn(Actor):
    """Its drain never returns."""

    def __drain__(self, seconds: float) -> None:
        threading.Event().wait()

    @endpoint
    def pid(self) -> int:
        return os.getpid()


@pytest.fixture(autouse=True)
def _own_job() -> Iterator[None]:
    """The agent reads its limits when it starts, and ends in these tests."""
    shutdown_context()
    yield
    shutdown_context()


def preempt() -> Any:
    """Tell the host agent to end, as a scheduler does; return its process."""
    from danaus.runtime import controller

    assert controller._controller is not None
    agent = controller._controller._agent
    assert agent is not None
    agent.send_signal(signal.SIGTERM)
    return agent


def counts(savers: Any) -> list[int]:
    return list(savers.add.options(timeout=LIMIT_S).call().get())


@pytest.mark.parametrize("saver", [Saver, AsyncSaver])
def test_actors_drain_and_go_on_elsewhere_with_what_they_saved(saver: type[Saver], tmp_path: Path) -> None:
    with this_host().spawn_procs({"rank": 2}, name="crew", restart=Restart()) as procs:
        changes = Events()
        procs.on_change(changes)
        savers = procs.spawn("savers", saver, str(tmp_path))
        assert [counts(savers), counts(savers)] == [[1, 1], [2, 2]]

        preempt()
        told = changes.wait_states("preempted", "preempted", "lost", "lost", "up", "up")

        assert {change.failure.kind for change in told if change.state == "lost"} == {FailureKind.PREEMPTED}
        assert len(list(tmp_path.glob("drained-*"))) == 2
        assert retried(lambda: counts(savers)) == [3, 3]


def test_a_mesh_that_shrinks_goes_on_without_the_ranks_that_were_taken(tmp_path: Path, unhandled: list[Any]) -> None:
    with this_host().spawn_procs({"rank": 2}, name="crew", restart=Restart(preempted="shrink")) as procs:
        changes = Events()
        procs.on_change(changes)
        savers = procs.spawn("savers", Saver, str(tmp_path))
        counts(savers)

        preempt()
        changes.wait_states("preempted", "lost", "given up")
        changes.wait(lambda seen: [change.state for change in seen].count("given up") == 2)

        assert savers.healthy().ranks == ()
        with pytest.raises(SupervisionError, match="preempted"):
            counts(savers)
        procs.replace().get(timeout=LIMIT_S)
        assert counts(savers) == [2, 2]
    assert unhandled == []


def test_a_drain_that_never_returns_is_cut_short_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANAUS_PREEMPT_S", "0.5")
    with this_host().spawn_procs({"rank": 1}, name="crew", restart=Restart()) as procs:
        stubborn = procs.spawn("stubborn", Stubborn)
        before = stubborn.pid.call_one().get(timeout=LIMIT_S)

        agent = preempt()
        agent.wait(LIMIT_S)

        assert retried(lambda: stubborn.pid.options(timeout=LIMIT_S).call_one().get()) != before


def test_a_notice_to_every_process_of_the_job_is_one_notice(tmp_path: Path) -> None:
    with this_host().spawn_procs({"rank": 2}, name="crew", restart=Restart()) as procs:
        savers = procs.spawn("savers", Saver, str(tmp_path))
        pids = list(savers.pid.call().get(timeout=LIMIT_S).values())
        assert counts(savers) == [1, 1]

        # As a scheduler does that knows no tree of processes, and a daemon that passes the signal on.
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        agent = preempt()
        agent.send_signal(signal.SIGTERM)
        agent.wait(LIMIT_S)

        assert retried(lambda: counts(savers)) == [2, 2]


def test_a_rank_that_alone_is_told_to_end_ends(tmp_path: Path) -> None:
    with this_host().spawn_procs({"rank": 1}) as procs:
        saver = procs.spawn("savers", Saver, str(tmp_path))
        (pid,) = saver.pid.call().get(timeout=LIMIT_S).values()
        os.kill(pid, signal.SIGTERM)

        with pytest.raises(SupervisionError, match="SIGTERM"):
            saver.wait.call_one().get(timeout=LIMIT_S)


def test_a_second_notice_ends_the_host_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANAUS_PREEMPT_S", "600")
    with this_host().spawn_procs({"rank": 1}, name="crew", restart=Restart()) as procs:
        changes = Events()
        procs.on_change(changes)
        procs.spawn("stubborn", Stubborn).pid.call_one().get(timeout=LIMIT_S)

        agent = preempt()
        changes.wait_states("preempted")
        agent.send_signal(signal.SIGINT)

        agent.wait(LIMIT_S)


def test_a_limit_that_is_no_number_is_refused_where_the_mesh_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANAUS_PREEMPT_S", "soon")
    with pytest.raises(ValueError, match=r"DANAUS_PREEMPT_S=soon: expected seconds, 0 or more"):
        this_host().spawn_procs({"rank": 1})
