"""Which ranks a run is to lose."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danaus.programs.chaos import POINTS, Saboteur, draw_losses


def test_the_seed_determines_the_losses_and_another_one_gives_others() -> None:
    first, again, other = (draw_losses(seed, 10, ranks=4, steps=100, save_every=20) for seed in (1, 1, 2))

    assert first == again
    assert first != other


def test_each_point_comes_as_often_as_the_others() -> None:
    losses = draw_losses(0, 18, ranks=4, steps=100, save_every=10)

    assert Counter(loss.point for loss in losses) == dict.fromkeys(POINTS, 3)


@given(seed=st.integers(0, 1000), num=st.integers(0, 19), save_every=st.integers(1, 30))
def test_losses_are_in_different_steps_after_the_first_and_where_their_point_is(
    seed: int, num: int, save_every: int
) -> None:
    losses = draw_losses(seed, num, ranks=3, steps=20, save_every=save_every)

    steps = [loss.step for loss in losses]
    assert steps == sorted(set(steps))
    assert len(steps) == num
    assert set(steps) <= set(range(2, 21))
    assert all(loss.rank in range(3) for loss in losses)
    assert all(loss.step % save_every == 0 or loss.step == 20 for loss in losses if loss.point == "checkpoint")


def test_more_losses_than_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="6 losses need as many steps, after the first; there are 6 steps"):
        draw_losses(0, 6, ranks=2, steps=6, save_every=2)


def test_what_has_struck_is_counted_by_point() -> None:
    assert Saboteur([]).table() == (
        "killed 0 ranks, at: data 0, forward 0, backward 0, all_reduce 0, optimizer 0, checkpoint 0"
    )
