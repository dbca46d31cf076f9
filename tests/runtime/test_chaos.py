"""Random faults against a model of what must hold, and proof that it would notice: three bugs planted on purpose.

``DANAUS_CHAOS_SEED=SEED`` repeats a run, ``SEED:ROUND`` one round of it; ``DANAUS_CHAOS_MINUTES`` says how long the
soak goes on, which otherwise ends after a thousand faults.
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import cloudpickle
import pytest

from danaus.runtime.context import local_proc
from danaus.runtime.messages import wire
from danaus.runtime.proc import LocalProc

from .testing.model import Rule
from .testing.soak import Config, Report, parse_seed, run_soak

# The workers of a test run cannot import this file by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

NUM_FAULTS = 1000


def run(config: Config) -> Report:
    report = run_soak(config)
    print(f"\n{report}")
    assert not report.violations, str(report)
    return report


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_hundred_random_faults_break_no_rule() -> None:
    report = run(Config(seed=1, num_faults=100))

    assert report.faults.total() >= 100
    assert report.restarts > 10


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
def test_chaos() -> None:
    seed, only_round = parse_seed(os.environ.get("DANAUS_CHAOS_SEED") or str(int.from_bytes(os.urandom(4), "little")))
    minutes = os.environ.get("DANAUS_CHAOS_MINUTES")
    duration_s = None if minutes is None else float(minutes) * 60
    print(f"\nseed {seed}" + ("" if only_round is None else f", round {only_round} alone"))

    run(Config(seed=seed, only_round=only_round, num_faults=NUM_FAULTS, duration_s=duration_s))


# What follows proves that the soak would notice. Each bug is planted by the test alone, and found by its own rule.

QUICK = Config(seed=2, num_faults=200, limit_s=2.0)


def is_for_subjects(local: LocalProc, envelope: wire.Envelope) -> bool:
    """Whether an envelope ends a message of the soak, rather than one of its own needs."""
    if envelope[0] == wire.CREDIT:
        return envelope[2].startswith("subjects")
    call: Any = getattr(local.ports.get(envelope[1]), "call", None)
    ends = envelope[0] == wire.REPLY and envelope[3] != wire.ITEM
    return ends and call is not None and call.endpoint.startswith("subjects.")


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("kind", "every"), [(wire.REPLY, 25), (wire.CREDIT, 1)])
def test_dropped_acknowledgement_is_noticed(monkeypatch: pytest.MonkeyPatch, kind: int, every: int) -> None:
    turn = itertools.count(1)
    dispatch = LocalProc._dispatch

    def drop(self: LocalProc, envelope: wire.Envelope) -> None:
        if envelope[0] == kind and is_for_subjects(self, envelope) and next(turn) % every == 0:
            return
        dispatch(self, envelope)

    monkeypatch.setattr(LocalProc, "_dispatch", drop)

    report = run_soak(QUICK)

    print(f"\n{report}")
    assert Rule.NO_ANSWER in report.rules


def handle_some_calls_twice() -> None:
    """Runs in every process of the mesh, before its actors."""
    from danaus.runtime.runner import ActorRunner

    put = ActorRunner.put
    turn = itertools.count(1)

    def put_twice(self: ActorRunner, envelope: wire.Envelope) -> None:
        again = envelope[0] == wire.CALL and envelope[10] is None and next(turn) % 20 == 0
        copy = list(envelope)
        put(self, envelope)
        if again:
            put(self, copy)

    ActorRunner.put = put_twice


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_duplicate_let_through_is_noticed() -> None:
    report = run_soak(replace(QUICK, bootstrap=handle_some_calls_twice))

    print(f"\n{report}")
    assert Rule.TWICE in report.rules


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_missed_death_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    local = local_proc()
    on_died = local.on_event["died"]
    missed: list[dict[str, Any]] = []

    def miss(fields: dict[str, Any]) -> None:
        if fields["proc"].startswith("chaos"):
            missed.append(fields)
        else:
            on_died(fields)

    monkeypatch.setitem(local.on_event, "died", miss)
    try:
        report = run_soak(QUICK)
    finally:
        # Nobody else would ever tell the mesh's handle that its processes are gone.
        for fields in missed:
            local.run_soon(partial(on_died, fields))

    print(f"\n{report}")
    assert Rule.DEATH_MISSED in report.rules
