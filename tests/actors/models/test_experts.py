"""The mixture of experts in plain torch, one token at a time beside it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional

from danaus.actors.models import Llama, tiny
from danaus.actors.models.experts import Experts, choose

pytestmark = pytest.mark.torch
CONFIG = dataclasses.replace(tiny(), num_experts=4, experts_per_token=2)


def test_each_token_is_the_weighted_sum_of_its_best_experts() -> None:
    torch.manual_seed(0)
    experts, x = Experts(CONFIG), torch.randn(2, 5, CONFIG.width)

    out = experts(x)

    for token, got in zip(x.flatten(0, 1), out.flatten(0, 1), strict=True):
        scores = experts.router(token)
        best = scores.topk(2).indices
        expected = torch.zeros_like(token)
        for weight, number in zip(scores[best].softmax(-1), best.tolist(), strict=True):
            gate, up, down = experts.gate_proj[number], experts.up_proj[number], experts.down_proj[number]
            expected += weight * (down @ (functional.silu(gate @ token) * (up @ token)))
        torch.testing.assert_close(got, expected)


def test_weights_of_the_chosen_add_up_to_one() -> None:
    weights, experts = choose(torch.randn(7, 4), 3)

    torch.testing.assert_close(weights.sum(-1), torch.ones(7))
    assert experts.shape == (7, 3)


def test_an_expert_without_tokens_gets_a_gradient_of_zero() -> None:
    torch.manual_seed(0)
    experts = Experts(dataclasses.replace(CONFIG, experts_per_token=1))

    experts(torch.randn(1, 1, CONFIG.width)).sum().backward()

    assert experts.gate_proj.grad is not None
    assert int(experts.gate_proj.grad.abs().sum((1, 2)).count_nonzero()) == 1


def test_weights_of_experts_are_drawn_like_those_of_a_single_block() -> None:
    model = Llama(CONFIG)

    model.init_weights(0)

    shrunk = 0.02 / (2 * CONFIG.num_layers) ** 0.5
    for name, weight in model.named_parameters():
        if "mlp" in name:
            expected = shrunk if name.endswith("down_proj") else 0.02
            assert weight.std().item() == pytest.approx(expected, rel=0.15), name


@pytest.mark.parametrize("per_token", [0, 5])
def test_more_choices_than_experts_are_refused(per_token: int) -> None:
    with pytest.raises(ValueError, match=f"experts_per_token {per_token} must be 1 to num_experts 4"):
        dataclasses.replace(CONFIG, experts_per_token=per_token)
