"""The trainer on real processes: replicas that stay equal, the losses of one process, checkpoints through the mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from danaus import ActorError, this_host
from danaus.actors import OptimizerConfig, Replica, TrainConfig, Trainer, make_corpus
from danaus.actors.models import tiny

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.torch
CONFIG = TrainConfig(
    model=tiny(),
    optimizer=OptimizerConfig(warmup_steps=3, total_steps=10),
    seq_len=32,
    batch_size=8,
    micro_batch_size=2,
    eval_windows=5,
)
CORPUS = make_corpus(["to be or not to be, that is the question. " * 100])
LIMIT_S = 15.0


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


def test_one_rank_saves_and_new_ranks_go_on_from_there(trainers: Trainer, tmp_path: Path) -> None:
    losses_of(trainers, 2)
    path = trainers.slice(dp=1).save.options(timeout=LIMIT_S).call_one(str(tmp_path)).get()
    expected = losses_of(trainers, 2)

    with this_host().spawn_procs({"dp": 2}, name="later", preload=Trainer.PRELOAD) as procs:
        later = procs.spawn("later", Trainer, CONFIG, CORPUS)
        assert later.slice(dp=0).resume.options(timeout=LIMIT_S).call_one(str(tmp_path)).get() == 2
        assert list(later.replicate.options(timeout=LIMIT_S).call(0).get()) == [2, 2]
        assert losses_of(later, 2) == expected

    assert path == str(tmp_path / "step-00000002")


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


@pytest.mark.parametrize("trainers", [1], indirect=True)
def test_a_folder_without_checkpoints_resumes_nothing_and_a_missing_checkpoint_is_an_error(
    trainers: Trainer, tmp_path: Path
) -> None:
    assert trainers.resume.options(timeout=LIMIT_S).call_one(str(tmp_path)).get() == 0
    with pytest.raises(ActorError, match="is no complete checkpoint"):
        trainers.load.options(timeout=LIMIT_S).call_one(str(tmp_path / "step-00000001")).get()
