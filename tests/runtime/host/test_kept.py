"""What actors want to have back is there for whoever is started again, and for the host that follows a lost one."""

from __future__ import annotations

from typing import Any

import pytest

from danaus.runtime.host import kept
from danaus.runtime.host.kept import WAIT_S, Kept

NOW_S = 1000.0


class Clock:
    """Stands still unless told otherwise."""

    def __init__(self) -> None:
        self.now_s = NOW_S

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(kept, "time", clock)
    return clock


def make(*, waits: bool = False) -> tuple[Kept, list[tuple[str, int, Any]]]:
    answers: list[tuple[str, int, Any]] = []
    return Kept(lambda proc, token, state: answers.append((proc, token, state)), waits=waits), answers


def test_the_next_process_of_a_place_gets_what_the_one_before_it_kept(clock: Clock) -> None:
    states, answers = make()
    states.keep("m@1x2.0", "worker", b"first")
    states.keep("m@1x2.0", "worker", b"second")
    states.keep("m@1x2.0", "other", b"its own")

    states.recall("m@1x2.0~3", "worker", 7)

    assert answers == [("m@1x2.0~3", 7, b"second")]


@pytest.mark.parametrize(("proc", "actor"), [("m@1x2.1", "worker"), ("m@1x2.0", "other"), ("n@1x2.0", "worker")])
def test_who_has_kept_nothing_is_told_so_at_once(clock: Clock, proc: str, actor: str) -> None:
    states, answers = make()
    states.keep("m@1x2.0", "worker", b"state")

    states.recall(proc, actor, 7)

    assert answers == [(proc, 7, None)]
    assert states.next_check_s() is None


def test_what_a_stopped_actor_kept_is_forgotten(clock: Clock) -> None:
    states, answers = make()
    states.keep("m.0", "worker", b"state")
    states.keep("m.0", "other", b"stays")

    states.forget("m.0~1", "worker")
    states.forget("m.0", "never kept")
    states.forget("n.5", "worker")
    states.recall("m.0~2", "worker", 1)
    states.recall("m.0~2", "other", 2)

    assert answers == [("m.0~2", 1, None), ("m.0~2", 2, b"stays")]


def test_a_mesh_that_nobody_wants_is_forgotten_whole_and_alone(clock: Clock) -> None:
    states, _ = make()
    for proc in ("m@1x2.0", "m@1x2.1", "mm@1x2.0"):
        states.keep(proc, "worker", b"state")

    states.forget_mesh("m@1x2")

    assert list(states.all) == ["mm@1x2.0"]


def test_copies_for_a_host_are_of_the_places_on_it(clock: Clock) -> None:
    states, _ = make()
    for proc in ("m@1:2x2.1", "m@1:2x2.2", "m@1:2x2.3", "local.0"):
        states.keep(proc, "worker", proc.encode())
    states.forget("m@1:2x2.3", "worker")

    assert states.of_host(2) == {"m@1:2x2.2": {"worker": b"m@1:2x2.2"}}
    assert states.of_host(0) == {"local.0": {"worker": b"local.0"}}
    assert states.of_host(5) == {}


def test_who_asks_before_the_copies_have_come_is_answered_when_they_come(clock: Clock) -> None:
    states, answers = make(waits=True)
    states.recall("m@1x2.0~1", "worker", 1)
    states.recall("m@1x2.1~1", "worker", 2)
    assert answers == []
    assert states.next_check_s() == NOW_S + WAIT_S

    states.take_over({"m@1x2.0": {"worker": b"copy"}})
    assert answers == [("m@1x2.0~1", 1, b"copy")]

    # There may be others who have copies.
    states.take_over({"m@1x2.1": {"worker": b"another's"}})
    assert answers[1:] == [("m@1x2.1~1", 2, b"another's")]
    assert states.next_check_s() is None


def test_who_is_kept_by_nobody_waits_only_so_long(clock: Clock) -> None:
    states, answers = make(waits=True)
    states.recall("m@1x2.0~1", "worker", 1)

    clock.now_s = NOW_S + WAIT_S - 0.01
    states.check(now_s=clock.now_s)
    assert answers == []
    clock.now_s = NOW_S + WAIT_S
    states.check(now_s=clock.now_s)

    assert answers == [("m@1x2.0~1", 1, None)]
    assert states.next_check_s() is None
    states.recall("m@1x2.0~1", "worker", 2)
    assert answers[1:] == [("m@1x2.0~1", 2, None)]


def test_what_was_kept_here_since_is_newer_than_a_copy(clock: Clock) -> None:
    states, answers = make(waits=True)
    states.keep("m@1x2.0~1", "worker", b"newer")

    states.take_over({"m@1x2.0": {"worker": b"copy", "other": b"copy of another"}})
    states.recall("m@1x2.0~1", "worker", 1)
    states.recall("m@1x2.0~1", "other", 2)

    assert answers == [("m@1x2.0~1", 1, b"newer"), ("m@1x2.0~1", 2, b"copy of another")]
