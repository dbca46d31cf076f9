"""When a silent process counts as stuck; every rule without a process, a clock or a socket."""

from __future__ import annotations

from collections import defaultdict

import pytest

from danaus.runtime.host.monitor import (
    MAX_PINGS_PER_S,
    Command,
    Monitor,
    Phase,
    Ping,
    TakeStack,
    TellRecovered,
    TellStuck,
)

LIMIT_S = 2.0
A, B = "a.0", "a.1"


class Bench:
    """A monitor, processes in states of the test's choice, and an agent that steps through time."""

    def __init__(self, *procs: str, limit_s: float = LIMIT_S) -> None:
        self.monitor = Monitor(limit_s)
        self.now_s = 100.0
        self.states: defaultdict[str, str] = defaultdict(lambda: "S")
        self.silent: set[str] = set()
        self.is_quiet = False
        self.takes_stacks = True
        self.said: list[tuple[float, Command]] = []
        for proc in procs:
            self.monitor.on_ready(proc, now_s=self.now_s)

    def run(self, seconds: float) -> list[Command]:
        """Step through time as the agent's loop does; return what was told and taken."""
        start, end_s = len(self.said), self.now_s + seconds
        while (next_s := self.monitor.next_check_s()) is not None and next_s <= end_s:
            self.now_s = max(self.now_s, next_s)
            self.step()
        self.now_s = end_s
        return [command for _, command in self.said[start:]]

    def step(self) -> None:
        for proc in self.monitor.due(now_s=self.now_s):
            self.do(self.monitor.on_look(proc, self.states[proc], now_s=self.now_s))
        self.do(self.monitor.check(now_s=self.now_s))

    def do(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Ping):
                answers = command.proc not in self.silent and self.states[command.proc] not in {"T", "t"}
                if answers:
                    self.do(self.monitor.on_pong(command.proc, command.number, now_s=self.now_s))
                else:
                    self.unanswered = command
                continue
            self.said.append((self.now_s, command))
            if isinstance(command, TakeStack) and self.takes_stacks:
                answer = self.monitor.on_stack(command.proc, command.episode, is_quiet=self.is_quiet, now_s=self.now_s)
                self.do(answer)


def told(commands: list[Command]) -> list[tuple[type, str]]:
    return [(type(command), command.proc) for command in commands if not isinstance(command, TakeStack)]


def test_one_that_answers_is_left_alone() -> None:
    bench = Bench(A, B)

    assert bench.run(60.0) == []


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.25, 0.49])
def test_a_silent_one_is_told_of_within_the_limit_and_not_at_once(after_s: float) -> None:
    bench = Bench(A, B)
    bench.run(10.0 + after_s)
    began_s = bench.now_s

    bench.silent.add(A)
    bench.run(10.0)

    assert told([command for _, command in bench.said]) == [(TellStuck, A)]
    assert LIMIT_S / 2 <= bench.said[-1][0] - began_s <= LIMIT_S * 0.95


def test_its_stack_is_taken_before_it_is_told_of() -> None:
    bench = Bench(A)
    bench.silent.add(A)

    first, second = bench.run(10.0)

    assert first == TakeStack(A, 0, is_stopped=False)
    assert isinstance(second, TellStuck)
    assert not second.is_stopped
    assert second.silent_s == pytest.approx(1.3)


def test_nothing_is_told_before_the_stack_is_there() -> None:
    bench = Bench(A)
    bench.silent.add(A)
    bench.takes_stacks = False

    assert bench.run(10.0) == [TakeStack(A, 0, is_stopped=False)]

    bench.do(bench.monitor.on_stack(A, 0, is_quiet=False, now_s=bench.now_s))
    assert isinstance(bench.said[-1][1], TellStuck)


def test_one_that_answers_while_its_stack_is_taken_is_not_told_of() -> None:
    bench = Bench(A)
    bench.silent.add(A)
    bench.takes_stacks = False
    bench.run(1.5)
    bench.silent.clear()
    bench.do(bench.monitor.on_pong(A, bench.unanswered.number, now_s=bench.now_s))

    bench.do(bench.monitor.on_stack(A, 0, is_quiet=False, now_s=bench.now_s))

    assert told(bench.run(10.0)) == []
    assert bench.monitor.phase(A) is Phase.ANSWERING


def test_each_episode_is_told_of_once_and_so_is_its_end() -> None:
    bench = Bench(A)
    for _ in range(3):
        bench.silent.add(A)
        assert told(bench.run(30.0)) == [(TellStuck, A)]
        bench.silent.clear()
        bench.do(bench.monitor.on_pong(A, bench.unanswered.number, now_s=bench.now_s))
        assert told([bench.said[-1][1]]) == [(TellRecovered, A)]
        assert bench.run(5.0) == []


def test_a_stopped_one_is_told_of_at_its_second_look() -> None:
    bench = Bench(A)
    bench.run(10.0)
    began_s = bench.now_s

    bench.states[A] = "T"
    taken, stuck = bench.run(1.0)

    assert (taken, told([stuck])) == (TakeStack(A, taken.episode, is_stopped=True), [(TellStuck, A)])  # type: ignore[union-attr]
    assert isinstance(stuck, TellStuck)
    assert stuck.is_stopped
    assert bench.said[-1][0] - began_s <= LIMIT_S / 2
    assert bench.run(60.0) == []


def test_one_that_was_stopped_for_a_moment_is_not_told_of() -> None:
    bench = Bench(A)
    bench.states[A] = "T"
    bench.run(0.6)
    bench.states[A] = "S"

    assert bench.run(10.0) == []


def test_a_stopped_one_that_goes_on_has_recovered() -> None:
    bench = Bench(A)
    bench.states[A] = "T"
    bench.run(5.0)

    bench.states[A] = "S"

    assert told(bench.run(1.0)) == [(TellRecovered, A)]
    assert bench.monitor.phase(A) is Phase.ANSWERING


def test_one_stopped_with_an_answer_outstanding_counts_as_stopped() -> None:
    bench = Bench(A)
    bench.silent.add(A)
    bench.run(0.6)

    bench.states[A] = "T"
    *_, stuck = bench.run(5.0)

    assert isinstance(stuck, TellStuck)
    assert stuck.is_stopped


def test_one_that_imports_is_not_told_of_until_it_does_something_else() -> None:
    bench = Bench(A)
    bench.silent.add(A)
    bench.is_quiet = True
    assert told(bench.run(60.0)) == []

    bench.is_quiet = False

    assert told(bench.run(2 * LIMIT_S)) == [(TellStuck, A)]


def test_an_import_is_looked_at_again_only_once_per_limit() -> None:
    bench = Bench(A)
    bench.silent.add(A)
    bench.is_quiet = True

    assert len(bench.run(20.0)) <= 10


def test_a_stopped_one_that_imports_is_told_of() -> None:
    bench = Bench(A)
    bench.states[A] = "T"
    bench.is_quiet = True

    assert told(bench.run(5.0)) == [(TellStuck, A)]


def test_one_in_a_traced_stop_is_left_alone_and_has_its_whole_time_afterwards() -> None:
    bench = Bench(A)
    bench.silent.add(A)
    bench.run(1.0)
    bench.states[A] = "t"
    assert told(bench.run(30.0)) == []

    bench.states[A] = "S"

    assert told(bench.run(0.9)) == []
    assert told(bench.run(LIMIT_S)) == [(TellStuck, A)]


def test_when_the_agent_was_held_up_nobody_is_blamed() -> None:
    bench = Bench(A, B)
    bench.silent |= {A, B}
    bench.run(0.9)

    bench.now_s += 60.0
    bench.step()

    assert bench.said == []
    assert bench.monitor.phase(A) is Phase.ANSWERING
    assert told(bench.run(LIMIT_S)) == [(TellStuck, A), (TellStuck, B)]


def test_nothing_is_expected_of_one_that_has_ended() -> None:
    bench = Bench(A)
    bench.silent.add(A)
    bench.run(0.9)

    bench.monitor.on_gone(A)

    assert bench.run(10.0) == []
    assert bench.monitor.next_check_s() is None
    assert bench.monitor.phase(A) is None


def test_what_comes_late_for_one_that_has_ended_is_ignored() -> None:
    monitor = Monitor(LIMIT_S)

    assert monitor.on_pong(A, 1, now_s=1.0) == []
    assert monitor.on_stack(A, 0, is_quiet=False, now_s=1.0) == []
    assert monitor.on_look(A, "T", now_s=1.0) == []


def test_an_old_answer_is_none() -> None:
    bench = Bench(A)
    bench.silent.add(A)
    bench.run(5.0)

    bench.do(bench.monitor.on_pong(A, bench.unanswered.number - 1, now_s=bench.now_s))

    assert bench.monitor.phase(A) is Phase.STUCK


@pytest.mark.parametrize("count", [1, 8, 100, 1000])
def test_many_processes_cost_the_agent_no_more_than_so_many_pings(count: int) -> None:
    bench = Bench(*(f"a.{rank}" for rank in range(count)))
    pings = 0
    on_look = bench.monitor.on_look

    def counted(proc: str, state: str, *, now_s: float) -> list[Command]:
        nonlocal pings
        commands = on_look(proc, state, now_s=now_s)
        pings += sum(isinstance(command, Ping) for command in commands)
        return commands

    bench.monitor.on_look = counted  # type: ignore[method-assign]
    bench.run(10.0)

    # Looks at half periods: with very many processes, they come up to one half early.
    assert count <= pings <= min(count * 4 * 10 / LIMIT_S, MAX_PINGS_PER_S * 10 * 1.1) + count


def test_idle_processes_are_looked_at_together() -> None:
    bench = Bench()
    for index in range(8):
        bench.monitor.on_ready(f"a.{index}", now_s=100.0 + index * 0.05)
    bench.run(20.0)
    wakes: set[float] = set()
    due = bench.monitor.due

    def counted(*, now_s: float) -> list[str]:
        found = due(now_s=now_s)
        wakes.update([now_s] if found else [])
        return found

    bench.monitor.due = counted  # type: ignore[method-assign]
    bench.run(20.0)

    assert len(wakes) <= 20 / 0.5 * 2 + 1
