"""What a fault may say, which moments count for it, and that a seed determines a schedule. No process here."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest

from danaus import testing

Fault, FaultKind, Chaos = testing.Fault, testing.FaultKind, testing.Chaos


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nth": 0}, "nth=0: the first time is 1"),
        ({"rank": -1}, "rank=-1: ranks count from 0"),
        ({"endpoint": "step", "point": "forward"}, "endpoint='step' with a point or step"),
        ({"endpoint": "step", "step": 3}, "endpoint='step' with a point or step"),
        ({"when": "during"}, "when='during': expected"),
        ({"point": "forward", "when": "after"}, 'when="after": a point has no after'),
        ({"incarnation": -1}, "incarnation=-1: expected"),
        ({"incarnation": "next"}, "incarnation='next': expected"),
    ],
)
def test_fault_that_contradicts_itself_is_refused_with_value_and_rule(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"Fault\.kill") as caught:
        Fault.kill(**fields)

    assert message in str(caught.value)


def test_a_delay_has_to_last() -> None:
    with pytest.raises(ValueError, match=r"Fault\.slow: 0 seconds: expected more than zero"):
        Fault.slow(0)


def test_endpoint_by_name_before_or_after_counts() -> None:
    fault = Fault.kill(endpoint="step")

    assert fault.matches_endpoint("step", "before")
    assert not fault.matches_endpoint("step", "after")
    assert not fault.matches_endpoint("save", "before")
    assert not fault.matches_point("step", None)
    assert Fault.kill(when="after").matches_endpoint("anything", "after")


def test_point_by_name_and_step_counts() -> None:
    assert Fault.kill(point="forward").matches_point("forward", 7)
    assert Fault.kill(point="forward", step=7).matches_point("forward", 7)
    assert not Fault.kill(point="forward", step=7).matches_point("forward", 8)
    assert not Fault.kill(point="forward", step=7).matches_point("backward", 7)
    assert Fault.kill(step=7).matches_point("anything", 7)
    assert not Fault.kill(step=7).matches_endpoint("anything", "before")


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault.kill(rank=3, endpoint="step", nth=5), "kill rank 3 before call 5 of 'step'"),
        (Fault.exit(7), "exit(7) every rank before call 1 of any endpoint"),
        (Fault.raises(KeyError("x"), rank=0, when="after"), "raise(KeyError) rank 0 after call 1 of any endpoint"),
        (Fault.stop(for_s=0.5, point="mid", step=2), "stop(0.5 s) every rank at point 'mid' of step 2, time 1"),
        (
            Fault.hang(holds_gil=True, step=1, incarnation="every"),
            "hang(holding the GIL) every rank at any point of step 1, time 1, incarnation every",
        ),
    ],
)
def test_fault_reads_as_a_sentence(fault: testing.Fault, text: str) -> None:
    assert str(fault) == text


@pytest.mark.parametrize("fault", [Fault.exit(7, rank=1), Fault.slow(0.5, point="mid", step=2, incarnation=3)])
def test_fault_survives_the_way_to_its_rank(fault: testing.Fault) -> None:
    assert Fault.from_fields(fault.as_fields()) == fault


def test_equal_seeds_give_equal_schedules_and_others_others() -> None:
    def draw(seed: int) -> list[testing.Fault]:
        return Chaos(seed, ranks=4, endpoints=("step", "save"), points=("forward",)).take(50)

    assert draw(7) == draw(7)
    assert [str(fault) for fault in draw(7)] == [str(fault) for fault in draw(7)]
    assert draw(7) != draw(8)


def test_schedule_does_not_depend_on_how_it_is_taken() -> None:
    one, other = Chaos(3, ranks=2), Chaos(3, ranks=2)

    assert one.take(2) + one.take(3) == other.take(5)


def test_schedule_keeps_within_what_it_was_given() -> None:
    chaos = Chaos(1, ranks=3, kinds={"kill": 1.0, "slow": 3.0}, points=("a", "b"), max_nth=4, max_s=0.2)

    faults = chaos.take(200)

    assert {fault.kind for fault in faults} == {FaultKind.KILL, FaultKind.SLOW}
    assert {fault.rank for fault in faults} == {0, 1, 2}
    assert {fault.nth for fault in faults} == {1, 2, 3, 4}
    assert {fault.point for fault in faults} == {"a", "b"}
    assert all(fault.seconds is None or 0 < fault.seconds <= 0.2 for fault in faults)
    kills = sum(fault.kind is FaultKind.KILL for fault in faults)
    assert 20 < kills < 80


def test_schedule_prints_its_seed_and_what_was_taken() -> None:
    chaos = Chaos(5, ranks=2)
    first = chaos.take(1)[0]

    assert str(chaos) == f"Chaos(seed=5), 1 faults:\n  1: {first}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 2, "kinds": ["explode"]}, "expected some of kill, stop, exit, raise, hang, slow"),
        ({"ranks": 2, "kinds": []}, "expected some of kill"),
        ({"ranks": 0}, "ranks=0"),
        ({"ranks": 1, "max_nth": 0}, "max_nth=0"),
    ],
)
def test_schedule_of_nothing_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chaos(1, **arguments)


def test_unarmed_point_does_nothing() -> None:
    from danaus.runtime.testing import armed

    assert armed.armed is None
    testing.point("forward", step=1)


@pytest.mark.parametrize("name", ["armed", "chaos", "injecting"])
def test_docstring_examples_hold(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(f"danaus.runtime.testing.{name}"))

    assert tried
    assert failed == 0
