"""What a daemon decides, without a process or a socket."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from danaus.runtime.network.daemon_jobs import (
    END_LIMIT_S,
    START_LIMIT_S,
    Asker,
    Command,
    JobState,
    JobTable,
    Key,
    Send,
    Signal,
    Start,
)
from danaus.runtime.network.daemon_protocol import Attach

DRAIN_S = 10.0
A, B = b"caller a", b"caller b"
KEY = Key("job", 1)


def attach(number: int = 1, incarnation: int = 0, *, job: str = "job", slot: int = 1, secret: bytes = b"s") -> Attach:
    return Attach(number, job, slot, incarnation, secret * 32)


class Table:
    """A table with a clock and short names."""

    def __init__(self, max_jobs: int = 4) -> None:
        self.table = JobTable({"host": "nest"}, drain_s=DRAIN_S, max_jobs=max_jobs)
        self.now_s = 100.0

    def attach(self, request: Attach, caller: bytes = A) -> list[Command]:
        return self.table.on_attach(Asker(caller, request.number), request, now_s=self.now_s)

    def detach(self, number: int = 9, job: str = "job", caller: bytes = A) -> list[Command]:
        return self.table.on_detach(Asker(caller, number), job, now_s=self.now_s)

    def up(self, key: Key = KEY) -> list[Command]:
        return self.table.on_up(key, "tcp://h:1", 77)

    def exit(self, code: int = 0, key: Key = KEY) -> list[Command]:
        return self.table.on_exit(key, code, now_s=self.now_s)

    def check(self, after_s: float) -> list[Command]:
        self.now_s += after_s
        return self.table.check(now_s=self.now_s)


def attached(number: int, caller: bytes = A) -> Send:
    return Send(caller, ["attached", number, {"endpoint": "tcp://h:1", "pid": 77, "host": "nest"}])


def exited(incarnation: int, code: int, caller: bytes = A) -> Send:
    return Send(caller, ["exited", {"job": "job", "slot": 1, "incarnation": incarnation, "code": code}])


def reasons(commands: list[Command]) -> list[tuple[bytes, int, str]]:
    sends = [each for each in commands if isinstance(each, Send) and each.message[0] == "refused"]
    return [(each.caller, each.message[1], each.message[2]["reason"]) for each in sends]


def test_an_agent_is_started_once_and_everybody_who_waits_is_told() -> None:
    table = Table()
    first = attach(1)

    assert table.attach(first) == [Start(KEY, first)]
    assert table.attach(attach(5), caller=B) == []

    assert table.up() == [attached(1), attached(5, B)]
    assert table.attach(attach(6)) == [attached(6)]
    assert table.table.state(KEY) is JobState.UP


def test_an_agent_that_never_comes_up_is_killed_and_refused() -> None:
    table = Table()
    table.attach(attach(1))

    assert table.table.next_check_s() == table.now_s + START_LIMIT_S
    assert table.check(START_LIMIT_S - 0.1) == []
    assert table.check(0.1) == [Signal(KEY, signal.SIGKILL)]
    assert table.check(1000.0) == []

    assert reasons(table.exit(-9)) == [(A, 1, f"its agent was not up within {START_LIMIT_S:g} s")]


def test_a_late_or_wrong_answer_of_an_agent_that_is_ended_changes_nothing() -> None:
    table = Table()
    table.attach(attach(1))
    table.detach()

    assert table.up() == []
    assert table.table.on_wrong(KEY, "nonsense", now_s=table.now_s) == []

    assert reasons(table.exit()) == [(A, 1, "the job was detached")]


def test_a_wrong_answer_kills_the_agent() -> None:
    table = Table()
    table.attach(attach(1))

    assert table.table.on_wrong(KEY, "nonsense", now_s=table.now_s) == [Signal(KEY, signal.SIGKILL)]
    assert reasons(table.exit(-9)) == [(A, 1, "nonsense")]


def test_an_agent_whose_process_cannot_be_made_is_refused_and_forgotten() -> None:
    table = Table()
    table.attach(attach(1))

    commands = table.table.on_not_started(KEY, "no memory", now_s=table.now_s)

    assert reasons(commands) == [(A, 1, "no memory")]
    assert table.table.state(KEY) is None


def test_detaching_answers_when_the_agents_have_ended_and_kills_those_that_do_not() -> None:
    table = Table()
    table.attach(attach(1))
    table.up()

    assert table.detach(9) == [Signal(KEY, signal.SIGINT)]
    assert table.check(END_LIMIT_S - 0.1) == []
    assert table.check(0.1) == [Signal(KEY, signal.SIGKILL)]
    assert table.check(1000.0) == []

    assert table.exit(-9) == [exited(0, -9), Send(A, ["detached", 9, {}])]


def test_detaching_one_job_leaves_the_others() -> None:
    table = Table()
    table.attach(attach(1))
    table.attach(attach(2, job="other"))

    assert table.detach(9) == [Signal(KEY, signal.SIGINT)]

    assert table.table.state(Key("other", 1)) is JobState.STARTING


def test_a_newer_incarnation_waits_for_the_end_of_the_older_one() -> None:
    table = Table()
    table.attach(attach(1))
    table.up()
    newer = attach(2, incarnation=1)

    assert table.attach(newer, caller=B) == [Signal(KEY, signal.SIGINT)]

    assert table.exit(0) == [exited(0, 0), Start(KEY, newer)]
    assert table.up() == [attached(2, B)]


def test_the_newest_of_several_incarnations_is_the_one_that_is_started() -> None:
    table = Table()
    table.attach(attach(1))
    second, third = attach(2, incarnation=1), attach(3, incarnation=2)
    table.attach(second)

    assert reasons(table.attach(third)) == [(A, 2, "incarnation 2 has taken its place")]
    assert reasons(table.attach(attach(4, incarnation=1))) == [(A, 4, "slot 1 of job job runs incarnation 2 already")]

    commands = table.exit(0)
    assert reasons(commands) == [(A, 1, "a newer incarnation has taken its place")]
    assert commands[-1] == Start(KEY, third)


def test_asking_again_for_the_incarnation_that_waits_is_answered_once_it_is_up() -> None:
    table = Table()
    table.attach(attach(1))
    table.up()
    newer = attach(2, incarnation=1)
    table.attach(newer)

    assert reasons(table.attach(attach(3, incarnation=1), caller=B)) == [(A, 2, "asked again meanwhile")]

    table.exit()
    assert table.up() == [attached(3, B)]


@pytest.mark.parametrize("state", list(JobState))
def test_an_older_incarnation_or_another_secret_is_refused_in_every_state(state: JobState) -> None:
    table = Table()
    table.attach(attach(1, incarnation=1))
    if state is not JobState.STARTING:
        table.up()
    if state is JobState.ENDING:
        table.detach()

    for request in (attach(2), attach(3, incarnation=1, secret=b"t")):
        (refusal,) = reasons(table.attach(request))
        assert refusal[2] == "slot 1 of job job runs incarnation 1 already"
    assert table.table.state(KEY) is state


def test_an_agent_that_ends_is_not_handed_out() -> None:
    table = Table()
    table.attach(attach(1))
    table.up()
    table.detach()

    (refusal,) = reasons(table.attach(attach(2)))

    assert "is ending" in refusal[2]


def test_an_incarnation_that_waits_is_dropped_when_its_job_is_detached() -> None:
    table = Table()
    table.attach(attach(1))
    table.up()
    table.attach(attach(2, incarnation=1))

    assert reasons(table.detach(9)) == [(A, 2, "the job was detached")]

    assert table.exit() == [exited(0, 0), Send(A, ["detached", 9, {}])]


def test_the_number_of_agents_is_bounded() -> None:
    table = Table(max_jobs=2)
    table.attach(attach(1))
    table.attach(attach(2, slot=2))

    assert "runs 2 jobs' agents already" in reasons(table.attach(attach(3, slot=3)))[0][2]

    table.exit()
    assert isinstance(table.attach(attach(4, slot=3))[0], Start)


def test_requests_that_pile_up_are_refused() -> None:
    table = Table()
    for number in range(100):
        table.attach(attach(number))
        table.detach(number)

    assert len(table.exit()) <= 16 + 16 * 4


def test_sigterm_gives_agents_time_to_drain_and_sigint_less() -> None:
    table = Table()
    table.attach(attach(1))
    table.up()

    assert table.table.on_end(signal.SIGTERM, now_s=table.now_s) == [Signal(KEY, signal.SIGTERM)]
    assert table.table.next_check_s() == table.now_s + DRAIN_S + END_LIMIT_S
    assert table.table.on_end(signal.SIGINT, now_s=table.now_s) == [Signal(KEY, signal.SIGINT)]
    assert table.table.next_check_s() == table.now_s + END_LIMIT_S
    # Asking again gains no time.
    table.now_s += 1.0
    table.table.on_end(signal.SIGTERM, now_s=table.now_s)
    assert table.table.next_check_s() == table.now_s - 1.0 + END_LIMIT_S


def test_the_daemon_is_over_when_it_is_told_to_end_and_the_last_agent_has() -> None:
    table = Table()
    table.attach(attach(1))
    table.up()
    table.attach(attach(2, incarnation=1))
    assert not table.table.is_over

    commands = table.table.on_end(signal.SIGINT, now_s=table.now_s)

    assert reasons(commands) == [(A, 2, "this daemon is ending")]
    assert not table.table.is_over
    assert table.exit() == [exited(0, 0)]
    assert table.table.is_over
    assert reasons(table.attach(attach(3))) == [(A, 3, "this daemon is ending")]


def test_a_command_shows_no_secret() -> None:
    shown: Any = Table().attach(attach(1, secret=b"S"))

    assert "SSSS" not in repr(shown)
