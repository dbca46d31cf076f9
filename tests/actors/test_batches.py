"""Data order: a function of seed, step and sample, whatever the ranks."""

from __future__ import annotations

import pytest
import torch

from danaus.actors.batches import Batches, mixed_seed, share, validation_windows

pytestmark = pytest.mark.torch


def batches(num_tokens: int = 1000, *, seq_len: int = 10, batch_size: int = 8, seed: int = 0) -> Batches:
    """Batches over the tokens 0, 1, 2...: a token is its own position."""
    return Batches(torch.arange(num_tokens, dtype=torch.int32), seq_len=seq_len, batch_size=batch_size, seed=seed)


def test_targets_are_the_inputs_one_token_later() -> None:
    inputs, targets = batches().take(3, range(8))

    assert inputs.shape == targets.shape == (8, 10)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs + 1, targets)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_the_shares_of_any_number_of_ranks_make_up_the_same_batch(num_ranks: int) -> None:
    whole, _ = batches().take(5, range(8))

    parts = [batches().take(5, share(rank, num_ranks, 8))[0] for rank in range(num_ranks)]

    assert torch.equal(torch.cat(parts), whole)


def test_a_step_is_the_same_whatever_was_taken_before() -> None:
    went_on = batches()
    for step in range(40):
        went_on.take(step, range(8))

    assert torch.equal(went_on.take(40, range(8))[0], batches().take(40, range(8))[0])
    assert torch.equal(went_on.take(2, range(8))[0], batches().take(2, range(8))[0])


def test_an_epoch_goes_through_every_window_once() -> None:
    source = batches(seq_len=10, batch_size=9)
    assert source.windows_per_epoch == 99

    firsts = torch.cat([source.take(step, range(9))[0][:, 0] for step in range(11)]).tolist()

    start = min(firsts)
    assert sorted(firsts) == list(range(start, start + 990, 10))
    assert firsts != sorted(firsts)


def test_epochs_differ_in_order_and_in_where_windows_start() -> None:
    source = batches(seq_len=10, batch_size=99)

    epochs = [source.take(step, range(99))[0][:, 0].tolist() for step in range(6)]

    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert len({min(epoch) for epoch in epochs}) > 1
    assert source.epoch_of(6) == 6.0


def test_another_seed_gives_another_order() -> None:
    assert not torch.equal(batches(seed=1).take(0, range(8))[0], batches(seed=2).take(0, range(8))[0])


@pytest.mark.parametrize("num_tokens", [20, 21, 29, 30])
def test_the_last_window_ends_inside_the_text(num_tokens: int) -> None:
    source = batches(num_tokens, seq_len=10, batch_size=1)

    for step in range(200):
        assert int(source.take(step, range(1))[1].max()) < num_tokens


def test_too_little_text_says_how_long_sequences_may_be() -> None:
    with pytest.raises(ValueError, match=r"19 tokens are too few for sequences of 10.*at most 9"):
        batches(19)


def test_ranks_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 8 sequences is not shared evenly by 3 ranks"):
        share(0, 3, 8)


def test_near_seeds_are_unrelated_and_order_matters() -> None:
    seeds = {mixed_seed(a, b) for a in range(50) for b in range(50)}

    assert len(seeds) == 2500
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    ones = [bin(mixed_seed(0, a) ^ mixed_seed(0, a + 1)).count("1") for a in range(100)]
    assert 25 < sum(ones) / 100 < 38


def test_validation_windows_are_spread_over_the_text() -> None:
    inputs, targets = validation_windows(torch.arange(101), seq_len=10, max_windows=4)

    assert inputs[:, 0].tolist() == [0, 30, 60, 90]
    assert torch.equal(inputs + 1, targets)
    assert len(validation_windows(torch.arange(101), seq_len=10, max_windows=99)[0]) == 10


def test_too_little_held_out_text_is_refused() -> None:
    with pytest.raises(ValueError, match="10 held-out tokens are too few"):
        validation_windows(torch.arange(10), seq_len=10, max_windows=1)
