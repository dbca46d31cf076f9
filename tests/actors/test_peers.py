"""Replicas that are not at the same step come together: over real collectives, in the threads of this process."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from danaus.actors import Corpus, OptimizerConfig, Replica, TrainConfig, make_corpus
from danaus.actors.agreement import Kind, NothingSoundError, Work
from danaus.actors.models import tiny
from danaus.actors.peers import Peers, SupersededError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import RunRanks

pytestmark = [pytest.mark.torch, pytest.mark.timeout(60)]
CONFIG = TrainConfig(
    model=tiny(),
    optimizer=OptimizerConfig(warmup_steps=3, total_steps=10),
    seq_len=32,
    batch_size=12,
    micro_batch_size=4,
    eval_windows=5,
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    letters = torch.randint(97, 123, (6000,), generator=torch.Generator().manual_seed(0)).tolist()
    return make_corpus([bytes(letters).decode()], val_fraction=0.1)


def train_alone(replica: Replica, num_steps: int) -> None:
    """Steps on this rank's share of the batches only: no two ranks have the same state afterwards."""
    for _ in range(num_steps):
        replica.step()


def spoil(replica: Replica) -> None:
    """Leave the state as a failure in the middle of its update does."""
    replica.state.is_sound = False
    with torch.no_grad():
        replica.state.model.norm.weight.fill_(torch.nan)


@dataclasses.dataclass
class Rank:
    before: str
    after: str
    step: int
    last: Any
    peers: Peers


def meet(
    run_ranks: RunRanks[Any], corpus: Corpus, setup: Callable[[int, Replica], Any], num_ranks: int = 3, **options: Any
) -> list[Rank]:
    def rank(number: int, group: Any) -> Rank:
        replica = Replica(CONFIG, corpus, rank=number, num_ranks=num_ranks)
        setup(number, replica)
        peers = Peers(replica, **options)
        before = replica.state.hash()
        peers.meet(group, 1)
        return Rank(before, replica.state.hash(), replica.state.step, replica.last, peers)

    return run_ranks(num_ranks, rank)


def test_all_take_the_state_of_the_rank_that_is_ahead_with_its_report(run_ranks: RunRanks[Any], corpus: Corpus) -> None:
    ranks = meet(run_ranks, corpus, lambda number, replica: train_alone(replica, (1, 0, 2)[number]))

    assert {rank.after for rank in ranks} == {ranks[2].before}
    assert [rank.step for rank in ranks] == [2, 2, 2]
    assert ranks[0].last == ranks[1].last == ranks[2].last
    assert ranks[0].last.step == 2


def test_a_rank_that_is_at_the_highest_step_already_is_not_touched(run_ranks: RunRanks[Any], corpus: Corpus) -> None:
    ranks = meet(run_ranks, corpus, lambda number, replica: train_alone(replica, (2, 2, 0)[number]))

    # the two would have been equal in a run; here they show who was written to
    assert [rank.after for rank in ranks] == [ranks[0].before, ranks[1].before, ranks[0].before]


def test_a_spoilt_replica_takes_the_state_of_one_at_an_earlier_step(run_ranks: RunRanks[Any], corpus: Corpus) -> None:
    def setup(number: int, replica: Replica) -> None:
        train_alone(replica, (2, 1, 1)[number])
        if number == 0:
            spoil(replica)

    ranks = meet(run_ranks, corpus, setup)

    assert ranks[0].after == ranks[1].before
    assert ranks[0].peers.replica.state.is_sound


def test_a_checkpoint_is_read_only_where_no_rank_has_a_state(
    run_ranks: RunRanks[Any], corpus: Corpus, tmp_path: Path
) -> None:
    saved = Replica(CONFIG, corpus)
    train_alone(saved, 3)
    saved.save(tmp_path)

    lost = meet(run_ranks, corpus, lambda *_: None, checkpoints=tmp_path)
    alive = meet(run_ranks, corpus, lambda n, replica: train_alone(replica, n == 1), checkpoints=tmp_path)

    assert {rank.after for rank in lost} == {saved.state.hash()}
    assert {rank.last for rank in lost} == {saved.last}
    assert {rank.after for rank in alive} == {alive[1].before}


def test_a_checkpoint_of_another_run_is_refused_on_all_ranks(
    run_ranks: RunRanks[Any], corpus: Corpus, tmp_path: Path
) -> None:
    other = Replica(dataclasses.replace(CONFIG, seed=5), corpus)
    other.step()
    other.save(tmp_path)

    def rank(number: int, group: Any) -> str:
        peers = Peers(Replica(CONFIG, corpus, rank=number, num_ranks=2), checkpoints=tmp_path)
        with pytest.raises((ValueError, RuntimeError)) as error:
            peers.meet(group, 1)
        return str(error.value)

    reader, other_rank = run_ranks(2, rank)
    assert "is of another run: seed is 5 there and 0 here" in reader
    assert "rank 0 could not load the checkpoint" in other_rank


@pytest.mark.parametrize("sound_rank", [0, 1])
def test_a_loaded_checkpoint_wins_over_later_steps(
    run_ranks: RunRanks[Any], corpus: Corpus, tmp_path: Path, sound_rank: int
) -> None:
    saved = Replica(CONFIG, corpus)
    saved.step()
    path = saved.save(tmp_path)

    def rank(number: int, group: Any) -> str:
        replica = Replica(CONFIG, corpus, rank=number, num_ranks=2)
        train_alone(replica, 4)
        peers = Peers(replica)
        peers.meet(group, 1)
        assert peers.load(group, path, rank=sound_rank) is None
        peers.meet(group, 1)
        return replica.state.hash()

    assert run_ranks(2, rank) == [saved.state.hash()] * 2


def test_a_step_that_is_completed_is_reported_and_not_done_again(run_ranks: RunRanks[Any], corpus: Corpus) -> None:
    def rank(number: int, group: Any) -> list[Any]:
        peers = Peers(Replica(CONFIG, corpus, rank=number, num_ranks=2))
        peers.meet(group, 1)
        first = peers.step(group, 3)
        with pytest.raises(ValueError, match=r"step\(2\): step 3 is completed already; ask for step\(4\)"):
            peers.step(group, 2)
        return [first, peers.step(group, 3), peers.step(group).step]

    for first, again, after in run_ranks(2, rank):
        assert first is again
        assert (first.step, after) == (3, 4)


def test_an_evaluation_that_one_rank_completed_is_handed_to_the_others(
    run_ranks: RunRanks[Any], corpus: Corpus
) -> None:
    def rank(number: int, group: Any) -> float:
        peers = Peers(Replica(CONFIG, corpus, rank=number, num_ranks=2))
        if number == 1:
            peers.evaluate(None)
        peers.meet(group, 1, Work(Kind.EVALUATE))
        # a collective would wait for ever on one rank and mix two results on both
        return peers.evaluate(group if number else None)

    first, second = run_ranks(2, rank)
    assert first == second


def test_a_call_that_is_out_of_date_makes_way_and_the_rank_comes_back_with_the_next(
    run_ranks: RunRanks[Any], corpus: Corpus
) -> None:
    def rank(number: int, group: Any) -> int:
        peers = Peers(Replica(CONFIG, corpus, rank=number, num_ranks=3))
        if number == 0:
            with pytest.raises(SupersededError, match=r"\(evaluate 0\) is out of date.*\(step 1\)"):
                peers.meet(group, 1, Work(Kind.EVALUATE))
        if number == 1:
            peers.meet(group, 1)
        peers.meet(group, 1, Work(Kind.STEP, 1))
        return peers.step(group, 1).step

    assert run_ranks(3, rank) == [1, 1, 1]


def test_within_a_generation_nothing_is_exchanged(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    group: Any = dist.ProcessGroupGloo(store, 0, 1, timedelta(seconds=5))
    peers = Peers(Replica(CONFIG, corpus))
    peers.meet(group, 4)
    monkeypatch.delattr(dist, "all_gather")

    peers.meet(group, 4)
    with pytest.raises(AttributeError, match="all_gather"):
        peers.meet(group, 5)


def test_alone_a_spoilt_replica_needs_a_checkpoint(corpus: Corpus, tmp_path: Path) -> None:
    replica = Replica(CONFIG, corpus)
    replica.step()
    expected = replica.state.hash()
    replica.save(tmp_path)
    spoil(replica)

    with pytest.raises(NothingSoundError, match=r"call load\(path\), or spawn the trainers with checkpoints="):
        Peers(replica).meet(None, 0)
    Peers(replica, checkpoints=tmp_path).meet(None, 0)

    assert replica.state.hash() == expected


def test_a_transfer_that_breaks_off_leaves_no_state_that_would_be_used(
    run_ranks: RunRanks[Any], corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = dist.irecv

    def break_off(*args: Any, tag: int, **kwargs: Any) -> Any:
        if tag == 2:
            raise RuntimeError("Connection closed by peer")
        return receive(*args, tag=tag, **kwargs)

    def rank(number: int, group: Any) -> bool:
        replica = Replica(CONFIG, corpus, rank=number, num_ranks=2)
        if number == 0:
            with suppress(RuntimeError):
                replica.state.send(group, [1])
        else:
            with pytest.raises(RuntimeError, match="Connection closed"):
                replica.state.receive(group, 0, place=(0, 0))
        return replica.state.is_sound

    monkeypatch.setattr(dist, "irecv", break_off)
    assert run_ranks(2, rank) == [True, False]
