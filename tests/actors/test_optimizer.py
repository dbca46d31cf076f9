"""The learning rate's course, and an optimizer whose state is there from the start."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from danaus.actors import OptimizerConfig
from danaus.actors.models import Llama, tiny
from danaus.actors.optimizer import learning_rate, make_optimizer

pytestmark = pytest.mark.torch
CONFIG = OptimizerConfig(peak_lr=1.0, final_lr_ratio=0.1, warmup_steps=4, total_steps=24)


def test_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    assert [learning_rate(step, CONFIG) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(14, CONFIG) == pytest.approx(0.55)
    assert learning_rate(9, CONFIG) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_learning_rate_stays_at_its_final_value() -> None:
    assert learning_rate(24, CONFIG) == learning_rate(10_000, CONFIG) == pytest.approx(0.1)
    assert learning_rate(23, CONFIG) > 0.1


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert learning_rate(0, OptimizerConfig(peak_lr=1.0, warmup_steps=0)) == 1.0


def test_a_run_of_warm_up_only_ends_at_the_peak() -> None:
    config = OptimizerConfig(peak_lr=1.0, warmup_steps=3, total_steps=3)

    assert [learning_rate(step, config) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


@pytest.mark.parametrize(
    "wrong", [{"warmup_steps": 30, "total_steps": 20}, {"warmup_steps": -1}, {"max_grad_norm": 0.0}]
)
def test_a_schedule_that_contradicts_itself_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="OptimizerConfig"):
        OptimizerConfig(**wrong)


def test_state_is_there_as_zeros_before_the_first_step_and_weights_are_untouched() -> None:
    model = Llama(tiny())
    before = [weight.clone() for weight in model.parameters()]

    optimizer = make_optimizer(model, CONFIG)

    for weight, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, old)
        assert weight.grad is None
        assert {key: float(value.abs().sum()) for key, value in optimizer.state[weight].items()} == {
            "step": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0,
        }  # fmt: skip


def test_only_matrices_decay() -> None:
    model = Llama(tiny())

    matrices, vectors = make_optimizer(model, CONFIG).param_groups

    assert matrices["weight_decay"] == 0.1
    assert vectors["weight_decay"] == 0.0
    assert {weight.ndim for weight in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))
