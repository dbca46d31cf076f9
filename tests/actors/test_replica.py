"""Training: any number of ranks computes what a plain loop does, and a resumed run what an uninterrupted one does."""

from __future__ import annotations

import dataclasses
import math
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from danaus.actors import Corpus, OptimizerConfig, Replica, TrainConfig, make_corpus, newest_checkpoint
from danaus.actors.batches import Batches
from danaus.actors.models import Llama, tiny
from danaus.actors.peers import Peers

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import RunRanks

pytestmark = [pytest.mark.torch, pytest.mark.timeout(60)]
CONFIG = TrainConfig(
    model=tiny(),
    optimizer=OptimizerConfig(warmup_steps=3, total_steps=10),
    seq_len=32,
    batch_size=8,
    micro_batch_size=2,
    eval_windows=5,
    seed=11,
)
STEPS = 10


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    letters = torch.randint(97, 123, (6000,), generator=torch.Generator().manual_seed(0)).tolist()
    return make_corpus([bytes(letters).decode()], val_fraction=0.1)


def plain_losses(corpus: Corpus) -> list[float]:
    """Ten steps as one would write them without any of the trainer."""
    model = Llama(CONFIG.model)
    model.init_weights(11)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [w for w in weights if w.ndim > 1], "weight_decay": 0.1},
            {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    batches = Batches(corpus.train_tokens, seq_len=32, batch_size=8, seed=11)
    losses: list[float] = []
    for step in range(STEPS):
        inputs, targets = batches.take(step, range(8))
        loss = functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        rate = 3e-3 * (step + 1) / 3 if step < 3 else 3e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - 3) / 7)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(run_ranks: RunRanks[Any], num_ranks: int, corpus: Corpus, config: TrainConfig = CONFIG) -> list[Any]:
    """Train; return (losses, gradient norms, held-out loss, hash) of each rank."""

    def rank(number: int, group: Any) -> Any:
        replica = Replica(config, corpus, rank=number, num_ranks=num_ranks)
        steps = [replica.step(group) for _ in range(STEPS)]
        held_out = replica.evaluate(group)
        return [m.loss for m in steps], [m.grad_norm for m in steps], held_out, replica.state.hash()

    return run_ranks(num_ranks, rank)


def test_one_two_and_four_ranks_have_the_losses_of_a_plain_loop(run_ranks: RunRanks[Any], corpus: Corpus) -> None:
    expected = plain_losses(corpus)

    for num_ranks in (1, 2, 4):
        for losses, _, _, _ in train(run_ranks, num_ranks, corpus):
            assert losses == pytest.approx(expected, rel=2e-6)
    assert expected[-1] < expected[0] - 0.5


def test_replicas_are_equal_to_the_last_bit_and_agree_on_what_they_report(
    run_ranks: RunRanks[Any], corpus: Corpus
) -> None:
    ranks = train(run_ranks, 4, corpus)

    assert all(rank == ranks[0] for rank in ranks)


def test_ranks_share_the_evaluation_even_where_it_does_not_divide(run_ranks: RunRanks[Any], corpus: Corpus) -> None:
    alone = train(run_ranks, 1, corpus)[0][2]

    assert train(run_ranks, 4, corpus)[0][2] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8, 100])
def test_accumulation_does_not_change_the_losses(corpus: Corpus, micro_batch_size: int) -> None:
    config = dataclasses.replace(CONFIG, micro_batch_size=micro_batch_size, bucket_bytes=1)
    replica = Replica(config, corpus)

    losses = [replica.step().loss for _ in range(4)]

    assert losses == pytest.approx(plain_losses(corpus)[:4], rel=2e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_equals_one_that_was_never_stopped(corpus: Corpus, tmp_path: Path, dropout: float) -> None:
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dropout=dropout))
    whole = Replica(config, corpus)
    losses = [whole.step().loss for _ in range(6)]
    first = Replica(config, corpus)
    for _ in range(3):
        first.step()
    first.save(tmp_path)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None

    resumed = Replica(config, corpus)
    resumed.step()
    torch.manual_seed(99)

    assert resumed.load(newest) == 3
    assert [resumed.step().loss for _ in range(3)] == losses[3:]
    assert resumed.state.hash() == whole.state.hash()


def test_a_run_can_be_resumed_with_another_number_of_ranks(
    run_ranks: RunRanks[Any], corpus: Corpus, tmp_path: Path
) -> None:
    first = Replica(CONFIG, corpus)
    for _ in range(3):
        first.step()
    path = first.save(tmp_path)

    def rank(number: int, group: Any) -> list[float]:
        replica = Replica(CONFIG, corpus, rank=number, num_ranks=2)
        if number == 0:
            replica.load(path)
        Peers(replica).meet(group, 1)
        return [replica.step(group).loss for _ in range(3)]

    assert run_ranks(2, rank)[1] == pytest.approx(plain_losses(corpus)[3:6], rel=2e-6)


@pytest.mark.parametrize("fails_at", [1, 2, 9])
def test_a_failed_collective_leaves_the_state_as_it_was_and_the_step_can_be_done_again(
    run_ranks: RunRanks[Any], corpus: Corpus, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    config = dataclasses.replace(CONFIG, bucket_bytes=4096)
    expected = plain_losses(corpus)[:2]
    calls = count(1)
    all_reduce = dist.all_reduce

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == fails_at:
            raise RuntimeError("Connection closed by peer")
        return all_reduce(*args, **kwargs)

    def rank(_number: int, group: Any) -> list[float]:
        replica = Replica(config, corpus)
        before = replica.state.hash()
        with pytest.raises(RuntimeError, match="Connection closed"):
            replica.step(group)
        assert replica.state.hash() == before
        return [replica.step(group).loss for _ in range(2)]

    monkeypatch.setattr(dist, "all_reduce", failing)
    assert run_ranks(1, rank)[0] == pytest.approx(expected, rel=2e-6)


def test_a_gradient_that_is_not_finite_leaves_the_state_as_it_was(corpus: Corpus) -> None:
    replica = Replica(CONFIG, corpus)
    with torch.no_grad():
        replica.state.model.norm.weight.fill_(math.inf)
    before = replica.state.hash()

    with pytest.raises(FloatingPointError, match=r"step 0: loss nan.*Lower peak_lr"):
        replica.step()

    assert replica.state.hash() == before


@pytest.mark.parametrize("method", ["step", "save"])
def test_a_state_whose_update_was_cut_short_is_not_used(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    replica = Replica(CONFIG, corpus)
    replica.step()
    update = replica.state.optimizer.step

    def fail() -> None:
        update()
        raise KeyboardInterrupt

    monkeypatch.setattr(replica.state.optimizer, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        replica.step()

    with pytest.raises(RuntimeError, match="rank 0 was overwritten in part when it failed after step 1: load a"):
        replica.step() if method == "step" else replica.save(tmp_path)


def test_a_checkpoint_that_does_not_fit_leaves_no_state_and_another_one_does(corpus: Corpus, tmp_path: Path) -> None:
    replica = Replica(CONFIG, corpus)
    good = replica.save(tmp_path / "good")
    bad = replica.save(tmp_path / "bad")
    (bad / ".metadata").write_bytes((bad / ".metadata").read_bytes().replace(b"model.norm", b"model.nope"))

    with pytest.raises(ValueError, match="does not fit"):
        replica.load(bad)
    with pytest.raises(RuntimeError, match="overwritten in part"):
        replica.step()

    assert replica.load(good) == 0
    assert replica.step().step == 1


def test_what_was_reported_of_the_last_step_is_in_the_checkpoint(corpus: Corpus, tmp_path: Path) -> None:
    replica = Replica(CONFIG, corpus)
    last = replica.step()

    resumed = Replica(CONFIG, corpus)
    resumed.load(replica.save(tmp_path))

    assert resumed.last == last


def test_evaluation_and_samples_change_nothing(corpus: Corpus) -> None:
    replica = Replica(CONFIG, corpus)
    before = replica.state.hash()

    assert replica.evaluate() == replica.evaluate()
    assert replica.sample("abc", max_tokens=20, seed=1) == replica.sample("abc", max_tokens=20, seed=1)

    assert replica.state.hash() == before
    assert replica.state.model.training


def test_a_sample_begins_with_its_prompt_and_may_have_none(corpus: Corpus) -> None:
    replica = Replica(CONFIG, corpus)

    assert replica.sample("abc", max_tokens=5).startswith("abc")
    assert isinstance(replica.sample("", max_tokens=5), str)


def test_bf16_products_learn_too(corpus: Corpus) -> None:
    replica = Replica(dataclasses.replace(CONFIG, precision="bf16"), corpus)

    losses = [replica.step().loss for _ in range(STEPS)]

    assert losses == pytest.approx(plain_losses(corpus), rel=0.02)


@pytest.mark.parametrize(
    ("changes", "name"), [({"seed": 12}, "seed"), ({"batch_size": 4}, "batch_size"), ({"seq_len": 16}, "seq_len")]
)
def test_a_checkpoint_of_another_run_is_refused_unless_only_its_weights_are_wanted(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, int], name: str
) -> None:
    path = Replica(CONFIG, corpus).save(tmp_path)
    other = Replica(dataclasses.replace(CONFIG, **changes), corpus)

    with pytest.raises(ValueError, match=f"is of another run: {name} is .* there and .* here.*load with exact=False"):
        other.load(path)
    assert other.load(path, exact=False) == 0
    assert f"with other settings: {name} is" in caplog.text


def test_a_checkpoint_of_another_model_is_refused_in_any_case(corpus: Corpus, tmp_path: Path) -> None:
    path = Replica(CONFIG, corpus).save(tmp_path)
    wider = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, hidden_width=96))

    with pytest.raises(ValueError, match=r"another run: model.hidden_width is 80 there and 96 here"):
        Replica(wider, corpus).load(path, exact=False)


def test_settings_without_influence_on_the_result_may_change(corpus: Corpus, tmp_path: Path) -> None:
    path = Replica(CONFIG, corpus).save(tmp_path)
    config = dataclasses.replace(CONFIG, micro_batch_size=4, bucket_bytes=999, eval_windows=2)

    assert Replica(config, corpus).load(path) == 0


def test_a_model_that_lacks_tokens_of_the_text_is_refused(corpus: Corpus) -> None:
    config = dataclasses.replace(CONFIG, model=tiny(vocab_size=100))

    with pytest.raises(ValueError, match="knows 100 tokens and the text has 256"):
        Replica(config, corpus)


@pytest.mark.parametrize("wrong", [{"seq_len": 65}, {"batch_size": 0}, {"micro_batch_size": 0}, {"precision": "fp8"}])
def test_a_config_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="TrainConfig"):
        dataclasses.replace(CONFIG, **wrong)
