"""Gradients summed over ranks in buckets, against a plain sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from danaus.actors.gradients import GradientBuckets

if TYPE_CHECKING:
    from .conftest import RunRanks

pytestmark = pytest.mark.torch


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def inputs(rank: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(rank + 1))


@pytest.mark.parametrize("bucket_bytes", [1, 200, 1 << 20])
def test_every_rank_gets_the_sum_of_the_gradients(run_ranks: RunRanks[Any], bucket_bytes: int) -> None:
    models = [make_model() for _ in range(3)]

    def rank(number: int, group: Any) -> None:
        buckets = GradientBuckets(models[number].parameters(), bucket_bytes=bucket_bytes)
        buckets.begin()
        first, second = inputs(number).chunk(2)
        models[number](first).sum().backward()
        buckets.send_during(group)
        models[number](second).sum().backward()
        buckets.finish()

    run_ranks(3, rank)

    plain = make_model()
    torch.stack([plain(inputs(number)).sum() for number in range(3)]).sum().backward()
    for weights in zip(plain.parameters(), *(model.parameters() for model in models), strict=True):
        for weight in weights[1:]:
            torch.testing.assert_close(weight.grad, weights[0].grad)
            assert torch.equal(weight.grad, weights[1].grad)


def test_weights_that_take_no_part_are_summed_all_the_same(run_ranks: RunRanks[Any]) -> None:
    models = [make_model() for _ in range(2)]

    def rank(number: int, group: Any) -> None:
        buckets = GradientBuckets(models[number].parameters(), bucket_bytes=1)
        buckets.begin()
        buckets.send_during(group)
        # rank 0 skips the first layers, as a model with routed experts would
        layers = models[number][4:] if number == 0 else models[number]
        layers(torch.ones(1, 8) if number == 0 else inputs(number)).sum().backward()
        buckets.finish()

    run_ranks(2, rank)

    gradients = [[weight.grad for weight in model.parameters() if weight.grad is not None] for model in models]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert len(gradients[0]) == 6
    assert float(gradients[0][0].abs().sum()) > 0


def test_a_step_after_one_that_was_abandoned_starts_afresh() -> None:
    model = make_model()
    buckets = GradientBuckets(model.parameters())
    buckets.begin()
    buckets.send_during(None)
    model(inputs(0)).sum().backward()

    buckets.begin()
    buckets.send_during(None)
    model(inputs(1)).sum().backward()
    buckets.finish()

    plain = make_model()
    plain(inputs(1)).sum().backward()
    for weight, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, expected.grad)


def test_buckets_hold_no_more_than_their_size_or_one_weight() -> None:
    assert GradientBuckets(make_model().parameters(), bucket_bytes=1).num_buckets == 6
    assert GradientBuckets(make_model().parameters(), bucket_bytes=300).num_buckets == 3
    assert GradientBuckets(make_model().parameters()).num_buckets == 1
