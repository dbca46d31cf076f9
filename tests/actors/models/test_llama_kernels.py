"""One switch moves the decoder from torch's own operations to the kernels: it computes and learns the same."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch

from danaus.actors import TrainConfig
from danaus.actors.models import Llama, generate, tiny
from danaus.tools.doctor import available_markers

if TYPE_CHECKING:
    from danaus.actors.models.llama import Kernels

pytestmark = pytest.mark.torch
DEVICE = "cuda" if "gpu" in available_markers() else "cpu"
KERNELS: list[object] = ["reference"]
if find_spec("triton") is not None:
    KERNELS.append("triton")
STEPS = 4


def model(kernels: Kernels, *, tied_head: bool = True, num_experts: int = 0) -> Llama:
    made = Llama(dataclasses.replace(tiny(), kernels=kernels, tied_head=tied_head, num_experts=num_experts))
    made.init_weights(3)
    return made.to(DEVICE)


def tokens(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def losses(kernels: Kernels, *, num_experts: int = 0) -> list[float]:
    """Some steps of AdamW on a text that repeats, so that there is something to learn."""
    net = model(kernels, num_experts=num_experts)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    text = tokens(1, 9, seed=0).repeat(1, 2)
    found: list[float] = []
    for _ in range(STEPS):
        loss = net.loss(text[:, :-1], text[:, 1:]) / text[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kernels", KERNELS)
def test_training_with_kernels_gives_the_losses_of_plain_torch(kernels: Kernels) -> None:
    plain = losses("torch")

    assert plain[-1] < plain[0] - 0.3
    assert losses(kernels) == pytest.approx(plain, rel=2e-4)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_mixture_of_experts_trains_to_the_losses_of_plain_torch(kernels: Kernels) -> None:
    assert losses(kernels, num_experts=4) == pytest.approx(losses("torch", num_experts=4), rel=2e-4)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("options", [{}, {"tied_head": False}, {"num_experts": 3}], ids=["tied", "untied", "experts"])
def test_every_gradient_is_that_of_plain_torch(kernels: Kernels, options: dict[str, Any]) -> None:
    text = tokens(1, 13, seed=1)
    plain, other = model("torch", **options), model(kernels, **options)

    for net in (plain, other):
        net.loss(text[:, :-1], text[:, 1:]).backward()

    for (name, mine), theirs in zip(other.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, theirs.grad, atol=2e-4, rtol=2e-4, msg=lambda text, of=name: f"{of}: {text}"
        )


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("num_experts", [0, 3])
def test_autocast_reaches_the_kernels(kernels: Kernels, num_experts: int) -> None:
    text = tokens(1, 13, seed=1)
    exact = model("torch", num_experts=num_experts).loss(text[:, :-1], text[:, 1:]).item()
    net = model(kernels, num_experts=num_experts)

    # fp16, since Triton's interpreter gets bf16 wrong
    with torch.autocast(DEVICE, torch.float16):
        loss = net.loss(text[:, :-1], text[:, 1:])
    loss.backward()

    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=2e-3)
    assert {weight.grad.dtype for weight in net.parameters() if weight.grad is not None} == {torch.float32}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_cache_gives_the_tokens_of_plain_torch(kernels: Kernels) -> None:
    prompt = tokens(2, 5, seed=2)

    def written(net: Llama) -> list[list[int]]:
        return [step.tolist() for step in generate(net, prompt, max_new_tokens=3, temperature=0.0)]

    assert written(model(kernels)) == written(model("torch"))


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels 'cuda' is unknown"):
        dataclasses.replace(tiny(), kernels="cuda")  # pyright: ignore[reportArgumentType]


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", KERNELS)
def test_bf16_training_at_a_real_size_gives_the_losses_of_plain_torch(kernels: Kernels) -> None:
    from danaus.actors.models import base

    config = base(vocab_size=32_000, max_seq_len=1_024)
    text = torch.randint(32_000, (4, 1_025), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    found: dict[str, list[float]] = {}
    for name in ("torch", kernels):
        net = Llama(dataclasses.replace(config, kernels=name))  # pyright: ignore[reportArgumentType]
        net.init_weights(0)
        net.to(DEVICE)
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4)
        found[name] = []
        for _ in range(10):
            with torch.autocast("cuda", torch.bfloat16):
                loss = net.loss(text[:, :-1], text[:, 1:]) / text[:, 1:].numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found[name].append(loss.item())

    assert found[kernels] == pytest.approx(found["torch"], rel=1e-2)


def test_a_run_may_go_on_with_other_kernels() -> None:
    plain, other = (
        TrainConfig(model=dataclasses.replace(tiny(), kernels=name), seq_len=32) for name in ("torch", "triton")
    )

    assert plain.identity() == other.identity()
