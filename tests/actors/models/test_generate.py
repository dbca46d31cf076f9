"""Writing on from a prompt: the cache changes the cost, not the result."""

from __future__ import annotations

import pytest
import torch

from danaus.actors.models import Llama, generate, new_cache, tiny
from danaus.actors.models.generate import pick

pytestmark = pytest.mark.torch


@pytest.fixture
def model() -> Llama:
    model = Llama(tiny(max_seq_len=32))
    model.init_weights(3)
    # far from uniform, so that a wrong position would show
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8.0 if weight.ndim > 1 else 1.0)
    return model.eval()


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 6], [1, 11]])
def test_a_cache_filled_in_any_chunks_gives_the_logits_of_the_whole(model: Llama, chunks: list[int]) -> None:
    tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = new_cache(model, 2)

    with torch.no_grad():
        parts = [model(part, cache) for part in tokens.split(chunks, dim=1)]

    assert cache.length == 12
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), atol=1e-4, rtol=1e-4)


def test_greedy_tokens_are_those_of_a_forward_over_everything_so_far(model: Llama) -> None:
    prompt = torch.tensor([[1, 2, 3], [7, 8, 9]])

    written = torch.stack(list(generate(model, prompt, max_new_tokens=20, temperature=0.0)), dim=1)

    whole = prompt
    for _ in range(20):
        whole = torch.cat((whole, model(whole)[:, -1:].argmax(-1)), dim=1)
    assert written.tolist() == whole[:, 3:].tolist()


def test_a_seed_fixes_what_is_drawn(model: Llama) -> None:
    def written(seed: int) -> list[int]:
        return [int(t) for t in generate(model, torch.tensor([[1]]), max_new_tokens=16, temperature=2.0, seed=seed)]

    assert written(1) == written(1)
    assert written(1) != written(2)


def test_top_k_draws_among_the_likeliest_only() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).repeat(500, 1)
    generator = torch.Generator().manual_seed(0)

    drawn = pick(logits, temperature=5.0, top_k=2, generator=generator)

    assert set(drawn.tolist()) == {1, 3}


def test_temperature_scales_the_logits() -> None:
    logits = torch.tensor([[0.0, 2.0]]).repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)

    share = float(pick(logits, temperature=2.0, top_k=None, generator=generator).float().mean())

    assert share == pytest.approx(1 / (1 + 2.718281828 ** (-1)), abs=0.01)


def test_the_mode_of_the_model_is_as_before_between_tokens(model: Llama) -> None:
    model.train()

    for _ in generate(model, torch.tensor([[1]]), max_new_tokens=2):
        assert model.training


@pytest.mark.parametrize(
    ("prompt_length", "options", "message"),
    [
        (0, {"max_new_tokens": 1}, "the prompt is empty"),
        (3, {"max_new_tokens": 30}, "3 prompt tokens and 30 new ones do not fit max_seq_len=32"),
        (3, {"max_new_tokens": 1, "temperature": -1.0}, "must not be negative"),
        (3, {"max_new_tokens": 1, "top_k": 0}, "not below 1"),
    ],
)
def test_what_cannot_be_written_is_refused_at_the_call(
    model: Llama, prompt_length: int, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, torch.zeros(1, prompt_length, dtype=torch.int64), **options)
