"""Trainers that lose ranks in the middle of a step end as if nothing had happened: real processes, injected faults.

`make soak` runs each point twenty times on random ranks; its seed is printed, and DANAUS_TEST_SEED repeats it.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from danaus import ActorError, Restart, SupervisionError, testing, this_host
from danaus.actors import OptimizerConfig, TrainConfig, Trainer, make_corpus
from danaus.actors.models import tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.torch, pytest.mark.timeout(90)]
POINTS = ("data", "forward", "backward", "all_reduce", "optimizer", "checkpoint")
NUM_RANKS = 3
SOAK_ROUNDS = 20
CONFIG = TrainConfig(
    model=tiny(),
    optimizer=OptimizerConfig(warmup_steps=3, total_steps=30),
    seq_len=32,
    batch_size=6,
    micro_batch_size=1,
    eval_windows=6,
    bucket_bytes=100_000,
)
CORPUS = make_corpus(["to be or not to be, that is the question. " * 100])
LIMIT_S = 30.0
SEED = int(os.environ.get("DANAUS_TEST_SEED", random.SystemRandom().randrange(10**6)))


@dataclass
class Course:
    """What a run did, step by step."""

    losses: dict[int, float] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)
    hashes: dict[int, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def undisturbed() -> Course:
    """A run in which nothing happens."""
    course = Course()
    with this_host().spawn_procs({"dp": NUM_RANKS}, name="undisturbed", preload=Trainer.PRELOAD) as procs:
        trainers = procs.spawn("trainers", Trainer, CONFIG, CORPUS)
        for step in range(1, SOAK_ROUNDS + 3):
            course.losses[step] = trainers.step.options(timeout=LIMIT_S).call(step).get().get(0).loss
            course.held_out[step] = trainers.evaluate.options(timeout=LIMIT_S).call().get().get(0)
            course.hashes[step] = trainers.state_hash.options(timeout=LIMIT_S).call().get().get(0)
    return course


@pytest.fixture
def policy(request: pytest.FixtureRequest) -> Restart:
    return getattr(request, "param", Restart(max_restarts=10 * SOAK_ROUNDS))


@pytest.fixture
def trainers(tmp_path: Path, policy: Restart) -> Iterator[Trainer]:
    procs = this_host().spawn_procs({"dp": NUM_RANKS}, name="trainers", preload=Trainer.PRELOAD, restart=policy)
    with procs:
        yield procs.spawn("trainers", Trainer, CONFIG, CORPUS, checkpoints=str(tmp_path), restart=policy)


def pids_of(trainers: Trainer) -> list[int]:
    return [rank.pid for rank in trainers.describe.options(timeout=LIMIT_S).call().get()]


def through_losses(action: Callable[[], object], *, limit: int = 10) -> list[SupervisionError]:
    """Make a call again for as long as ranks that it needs are lost and restarted; return what it failed with."""
    errors: list[SupervisionError] = []
    while True:
        try:
            action()
        except SupervisionError as error:
            errors.append(error)
            if not error.failure.restarts or len(errors) == limit:
                raise
        else:
            return errors


def train(trainers: Trainer, steps: range, course: Course, *, save_every: int = 1) -> None:
    """Train step by step, with evaluation and checkpoint after each."""
    for step in steps:

        def complete(step: int = step) -> None:
            metrics = list(trainers.step.options(timeout=LIMIT_S).call(step).get())
            assert {(each.step, each.loss) for each in metrics} == {(step, metrics[0].loss)}
            course.losses[step] = metrics[0].loss

        def evaluate(step: int = step) -> None:
            (course.held_out[step],) = set(trainers.evaluate.options(timeout=LIMIT_S).call().get())

        through_losses(complete)
        through_losses(evaluate)
        if step % save_every == 0:
            through_losses(lambda: trainers.save.options(timeout=LIMIT_S).call().get())


def check_end(trainers: Trainer, course: Course, undisturbed: Course) -> None:
    """Nothing shows that something has happened."""
    last = max(course.losses)
    hashes = list(trainers.state_hash.options(timeout=LIMIT_S).call().get())
    steps = [rank.step for rank in trainers.describe.options(timeout=LIMIT_S).call().get()]
    assert steps == [last] * NUM_RANKS
    assert course.losses == {step: undisturbed.losses[step] for step in range(1, last + 1)}
    assert course.held_out == {step: undisturbed.held_out[step] for step in range(1, last + 1)}
    assert hashes == [undisturbed.hashes[last]] * NUM_RANKS


def kill_at(trainers: Trainer, undisturbed: Course, ranks: dict[int, int], point: str) -> None:
    """Kill, at ``point`` of each step in ``ranks``, the rank that is named there; compare survivors and result."""
    course = Course()
    for step in range(1, max(ranks) + 2):
        before = pids_of(trainers)
        if step not in ranks:
            train(trainers, range(step, step + 1), course)
            continue
        with testing.inject(trainers, testing.Fault.kill(rank=ranks[step], point=point, step=step)) as faults:
            train(trainers, range(step, step + 1), course)
        (fired,) = faults.fired
        after = pids_of(trainers)
        assert fired.pid == before[ranks[step]]
        assert [rank for rank in range(NUM_RANKS) if before[rank] != after[rank]] == [ranks[step]]
    check_end(trainers, course, undisturbed)


@pytest.mark.parametrize("point", POINTS)
def test_no_step_is_lost_with_a_rank_at_any_point(trainers: Trainer, undisturbed: Course, point: str) -> None:
    choose = random.Random(f"{SEED} {point}")
    print(f"seed {SEED}")

    kill_at(trainers, undisturbed, {step: choose.randrange(NUM_RANKS) for step in (2, 3)}, point)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("point", POINTS)
def test_no_step_is_lost_with_many_ranks(trainers: Trainer, undisturbed: Course, point: str) -> None:
    choose = random.Random(f"{SEED} {point} soak")
    print(f"seed {SEED}")

    kill_at(trainers, undisturbed, {2 + n: choose.randrange(NUM_RANKS) for n in range(SOAK_ROUNDS)}, point)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(3))
def test_no_step_is_lost_with_two_ranks_at_different_points(
    trainers: Trainer, undisturbed: Course, number: int
) -> None:
    choose, course = random.Random(f"{SEED} {number}"), Course()
    print(f"seed {SEED}")

    train(trainers, range(1, 2), course)
    for step in range(2, SOAK_ROUNDS + 2):
        first, second = choose.sample(range(NUM_RANKS), 2)
        faults = [
            testing.Fault.kill(rank=first, point=choose.choice(POINTS), step=step),
            testing.Fault.kill(rank=second, point=choose.choice([*POINTS, "recover"])),
        ]
        with testing.inject(trainers, *faults) as injection:
            train(trainers, range(step, step + 1), course)
        assert faults[0] in [fired.fault for fired in injection.fired]
    check_end(trainers, course, undisturbed)


def faults_and_course(trainers: Trainer, undisturbed: Course, *faults: testing.Fault, steps: int = 4) -> list[int]:
    """Train two steps, then through ``faults``; return the ranks whose process is another one afterwards."""
    course = Course()
    train(trainers, range(1, 3), course, save_every=2)
    before = pids_of(trainers)
    with testing.inject(trainers, *faults) as injection:
        train(trainers, range(3, steps + 1), course, save_every=100)
    assert len(injection.fired) >= len(faults)
    check_end(trainers, course, undisturbed)
    after = pids_of(trainers)
    return [rank for rank in range(NUM_RANKS) if before[rank] != after[rank]]


def test_two_ranks_that_die_at_once_are_both_replaced(trainers: Trainer, undisturbed: Course) -> None:
    faults = [testing.Fault.kill(rank=rank, point="backward", step=4) for rank in (1, 2)]

    assert faults_and_course(trainers, undisturbed, *faults) == [1, 2]


@pytest.mark.parametrize("point", ["forward", "all_reduce"])
def test_the_rank_that_holds_the_groups_store_is_replaced_too(
    trainers: Trainer, undisturbed: Course, point: str
) -> None:
    assert faults_and_course(trainers, undisturbed, testing.Fault.kill(rank=0, point=point, step=3)) == [0]


def test_a_run_whose_ranks_all_die_goes_on_from_the_newest_checkpoint(trainers: Trainer, undisturbed: Course) -> None:
    fault = testing.Fault.kill(point="forward", step=4)

    assert faults_and_course(trainers, undisturbed, fault) == [0, 1, 2]


@pytest.mark.parametrize(("rank", "incarnation"), [(2, "current"), (0, "current"), (1, 1)])
def test_a_rank_that_dies_while_another_is_replaced_is_replaced_as_well(
    trainers: Trainer, undisturbed: Course, rank: int, incarnation: int
) -> None:
    first = testing.Fault.kill(rank=1, point="backward", step=3)
    second = testing.Fault.kill(rank=rank, point="recover", incarnation=incarnation)

    assert faults_and_course(trainers, undisturbed, first, second) == sorted({1, rank})


def test_a_rank_lost_between_two_calls_has_the_state_again_before_the_next(
    trainers: Trainer, undisturbed: Course
) -> None:
    course = Course()
    train(trainers, range(1, 4), course)
    before = pids_of(trainers)

    testing.kill(trainers, 1)
    through_losses(lambda: trainers.slice(dp=1).describe.options(timeout=LIMIT_S).call_one().get())

    # nobody has called for anything that all ranks take part in
    assert trainers.slice(dp=1).describe.options(timeout=LIMIT_S).call_one().get().step == 3
    train(trainers, range(4, 5), course)
    after = pids_of(trainers)
    assert [rank for rank in range(NUM_RANKS) if before[rank] != after[rank]] == [1]
    check_end(trainers, course, undisturbed)


@pytest.mark.parametrize("policy", [Restart(stuck=True)], indirect=True)
def test_a_rank_that_is_stuck_is_replaced_where_the_policy_says_so(trainers: Trainer, undisturbed: Course) -> None:
    assert faults_and_course(trainers, undisturbed, testing.Fault.stop(rank=1, point="forward", step=3)) == [1]


@pytest.mark.parametrize("policy", [Restart(scope="mesh")], indirect=True)
def test_a_policy_that_restarts_all_ranks_goes_on_from_the_checkpoint(trainers: Trainer, undisturbed: Course) -> None:
    assert faults_and_course(trainers, undisturbed, testing.Fault.kill(rank=1, point="forward", step=4)) == [0, 1, 2]


def test_an_actor_that_fails_in_a_process_that_lives_is_replaced_too(trainers: Trainer, undisturbed: Course) -> None:
    assert (
        faults_and_course(trainers, undisturbed, testing.Fault.raises(SystemExit(3), rank=1, point="backward", step=3))
        == []
    )


@pytest.mark.parametrize("point", ["data", "backward", "all_reduce", "optimizer", "checkpoint"])
def test_an_error_on_one_rank_releases_the_others_and_the_call_can_be_made_again(
    trainers: Trainer, undisturbed: Course, point: str
) -> None:
    course = Course()
    train(trainers, range(1, 3), course)
    before = pids_of(trainers)

    with testing.inject(trainers, testing.Fault.raises(ValueError("no luck"), rank=1, point=point, step=3)):
        with pytest.raises(ActorError, match="no luck"):
            train(trainers, range(3, 4), course)
        train(trainers, range(3, 5), course)

    assert pids_of(trainers) == before
    check_end(trainers, course, undisturbed)
