"""How calls past their deadlines are told of: ranks at the same place together, in words that a person can read."""

from __future__ import annotations

from typing import Any

import pytest

from danaus.runtime.overdue import OverdueNotes, describe

STACK = '  File "work.py", line 7, in step\n    time.sleep(9)\n'


def fields_of(rank: int, *, port: int = 1, stack: str = STACK) -> dict[str, Any]:
    return {
        "endpoint": "trainers.step",
        "mesh": "trainers",
        "rank": rank,
        "host": "gpu1",
        "pid": 100 + rank,
        "port": port,
        "deadline_s": 2.5,
        "stack": stack,
    }


class Listener:
    """A process that keeps timers for the test to run."""

    def __init__(self) -> None:
        self.on_event: dict[str, Any] = {}
        self.timers: list[Any] = []
        self.said: list[str] = []
        OverdueNotes(self, self.said.append)  # type: ignore[arg-type]

    def run_at(self, at_s: float, task: Any) -> None:
        self.timers.append(task)

    def hear(self, *events: dict[str, Any]) -> list[str]:
        for fields in events:
            self.on_event["overdue"](fields)
        [timer] = self.timers
        self.timers.clear()
        timer()
        said = self.said[:]
        self.said.clear()
        return said


def test_one_rank_is_named_with_host_and_pid_and_its_stack() -> None:
    assert describe([fields_of(3)]) == (
        "trainers.step is past its deadline of 2.5 s on rank 3 (host gpu1, pid 103); it is at:\n"
        '  File "work.py", line 7, in step\n'
        "    time.sleep(9)"
    )


@pytest.mark.parametrize(
    ("ranks", "text"), [((1, 0), "0-1"), ((2, 0, 1, 7), "0-2, 7"), ((5, 3, 1), "1, 3, 5"), (range(512), "0-511")]
)
def test_several_ranks_are_joined(ranks: tuple[int, ...], text: str) -> None:
    told = describe([fields_of(rank) for rank in ranks])

    assert f"on ranks {text} (the first: host gpu1, pid {100 + min(ranks)}); it is at:" in told


def test_ranks_at_the_same_place_are_told_of_once() -> None:
    [told] = Listener().hear(fields_of(0), fields_of(1))

    assert "ranks 0-1" in told


def test_other_places_and_other_calls_are_told_of_apart() -> None:
    listener = Listener()

    said = listener.hear(fields_of(0), fields_of(1, stack="elsewhere"), fields_of(2, port=2))

    assert [text.partition(" (")[0].rpartition(" ")[2] for text in said] == ["0", "1", "2"]
    assert len(listener.hear(fields_of(0))) == 1
