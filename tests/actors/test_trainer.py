"""The trainer on real processes: replicas that stay equal, the losses of one process, checkpoints through the mesh."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from danaus import ActorError, SupervisionError, this_host
from danaus.actors import OptimizerConfig, Replica, TrainConfig, Trainer, make_corpus
from danaus.actors.models import tiny

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.torch, pytest.mark.timeout(60)]
CONFIG = TrainConfig(
    model=tiny(),
    optimizer=OptimizerConfig(warmup_steps=3, total_steps=10),
    seq_len=32,
    batch_size=8,
    micro_batch_size=2,
    eval_windows=5,
)
CORPUS = make_corpus(["to be or not to be, that is the question. " * 100])
LIMIT_S = 30.0


@pytest.fixture
def trainers(request: pytest.FixtureRequest) -> Iterator[Trainer]:
    """Trainers on as many processes as the test's parameter says, by default two."""
    with this_host().spawn_procs(
        {"dp": getattr(request, "param", 2)}, name="trainers", preload=Trainer.PRELOAD
    ) as procs:
        yield procs.spawn("trainers", Trainer, CONFIG, CORPUS)


def losses_of(trainers: Trainer, num_steps: int) -> list[list[float]]:
    """Losses per step, each as all ranks report it."""
    step = trainers.step.options(timeout=LIMIT_S)
    return [[metrics.loss for metrics in step.call().get()] for _ in range(num_steps)]


@pytest.mark.parametrize("trainers", [1, 2, 4], indirect=True)
def test_ranks_have_the_losses_of_one_process_and_stay_equal(trainers: Trainer) -> None:
    alone = Replica(CONFIG, CORPUS)
    expected = [alone.step().loss for _ in range(5)]

    losses = losses_of(trainers, 5)

    for ranks, loss in zip(losses, expected, strict=True):
        assert ranks == pytest.approx([loss] * len(ranks), rel=2e-6)
    assert len(set(trainers.state_hash.options(timeout=LIMIT_S).call().get())) == 1


def test_many_steps_can_be_asked_for_at_once(trainers: Trainer) -> None:
    steps = [[metrics.step for metrics in ranks] for ranks in trainers.train_steps.options(timeout=LIMIT_S).call(3)]

    assert steps == [[1, 1], [2, 2], [3, 3]]


def test_rank_0_saves_for_all_and_new_ranks_go_on_from_there(trainers: Trainer, tmp_path: Path) -> None:
    losses_of(trainers, 2)
    paths = list(trainers.save.options(timeout=LIMIT_S).call(str(tmp_path)).get())
    expected = losses_of(trainers, 2)

    with this_host().spawn_procs({"dp": 2}, name="later", preload=Trainer.PRELOAD) as procs:
        later = procs.spawn("later", Trainer, CONFIG, CORPUS, checkpoints=str(tmp_path))
        assert list(later.sync.options(timeout=LIMIT_S).call().get()) == [2, 2]
        assert losses_of(later, 2) == expected

    assert paths == [str(tmp_path / "step-00000002")] * 2


@pytest.mark.parametrize("reader", [0, 1])
def test_one_rank_loads_for_all_also_an_earlier_state(trainers: Trainer, tmp_path: Path, reader: int) -> None:
    losses_of(trainers, 1)
    path = trainers.save.options(timeout=LIMIT_S).call(str(tmp_path)).get().get(0)
    expected = losses_of(trainers, 2)

    assert list(trainers.load.options(timeout=LIMIT_S).call(path, rank=reader).get()) == [1, 1]
    assert losses_of(trainers, 2) == expected


def test_a_step_can_be_asked_for_by_its_number_again_and_again(trainers: Trainer) -> None:
    step = trainers.step.options(timeout=LIMIT_S)

    first, again = step.call(3).get(), step.call(3).get()

    assert [metrics.step for metrics in first] == [3, 3]
    assert list(again) == list(first)
    with pytest.raises(ActorError, match=r"step\(2\): step 3 is completed already"):
        step.call(2).get()
    assert [metrics.step for metrics in step.call().get()] == [4, 4]


def test_ranks_are_at_one_state_before_the_first_call(trainers: Trainer, tmp_path: Path) -> None:
    first = trainers.slice(dp=0)

    assert first.sync.options(timeout=LIMIT_S).call_one().get() == 0
    with pytest.raises(ActorError, match=r"name a directory here, or spawn the trainers with checkpoints="):
        first.save.options(timeout=LIMIT_S).call_one().get()


def test_ranks_agree_on_the_held_out_loss_and_on_samples(trainers: Trainer) -> None:
    held_out = list(trainers.evaluate.options(timeout=LIMIT_S).call().get())
    samples = list(trainers.sample.options(timeout=LIMIT_S).call("to be", max_tokens=10).get())

    assert held_out[0] == held_out[1] == pytest.approx(Replica(CONFIG, CORPUS).evaluate(), rel=1e-5)
    assert samples[0] == samples[1]
    assert samples[0].startswith("to be")


def test_ranks_tell_where_they_run(trainers: Trainer) -> None:
    ranks = list(trainers.describe.options(timeout=LIMIT_S).call().get())

    assert [rank.rank for rank in ranks] == [0, 1]
    assert len({rank.pid for rank in ranks}) == 2
    assert ranks[0].num_parameters == sum(w.numel() for w in Replica(CONFIG, CORPUS).state.model.parameters())


@pytest.mark.parametrize("trainers", [1, 2], indirect=True)
def test_a_checkpoint_that_is_not_there_is_an_error_and_changes_nothing(trainers: Trainer, tmp_path: Path) -> None:
    losses_of(trainers, 1)

    with pytest.raises(ActorError, match=r"is no complete checkpoint|could not load the checkpoint"):
        trainers.load.options(timeout=LIMIT_S).call(str(tmp_path / "step-00000001")).get()

    assert trainers.sync.options(timeout=LIMIT_S).call().get().get(0) == 1
    with pytest.raises(ActorError, match=r"load\(rank=5\): the ranks are 0 to"):
        trainers.load.options(timeout=LIMIT_S).call(str(tmp_path), rank=5).get()


def test_a_run_does_not_begin_with_a_checkpoint_of_another(trainers: Trainer, tmp_path: Path) -> None:
    losses_of(trainers, 1)
    trainers.save.options(timeout=LIMIT_S).call(str(tmp_path)).get()
    config = dataclasses.replace(CONFIG, seed=1)

    with this_host().spawn_procs({"dp": 2}, name="other", preload=Trainer.PRELOAD) as procs:
        other = procs.spawn("other", Trainer, config, CORPUS, checkpoints=str(tmp_path))
        with pytest.raises(SupervisionError, match="is of another run: seed is 0 there and 1 here"):
            other.sync.options(timeout=LIMIT_S).call().get()
