"""Writes on from a prompt, one token at a time, over a key/value cache.

Shapes:  B = sequences, T = tokens, V = vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import KVCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .llama import Llama


def new_cache(model: Llama, batch_size: int) -> KVCache:
    """Return an empty cache for ``batch_size`` sequences of ``model``, of its dtype and on its device."""
    config, weight = model.config, model.embed_tokens.weight
    return KVCache(
        num_layers=config.num_layers,
        batch_size=batch_size,
        num_kv_heads=config.num_kv_heads,
        max_seq_len=config.max_seq_len,
        head_width=config.head_width,
        dtype=weight.dtype,
        device=weight.device,
    )


def pick(logits_BV: Tensor, *, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Draw ``tokens_B`` from the softmax of ``logits_BV / temperature``, among the ``top_k`` likeliest.

    A temperature of 0 takes the likeliest.
    """
    if temperature == 0.0:
        return logits_BV.argmax(-1)
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
    probabilities_BV = (logits_BV.float() / temperature).softmax(-1)
    return probabilities_BV.multinomial(1, generator=generator).squeeze(1)


def generate(
    model: Llama,
    prompt_BT: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Yield ``tokens_B`` for each new position, up to ``max_new_tokens`` of them.

    The model is put into evaluation mode while a token is being made.

    Args:
        model: The decoder.
        prompt_BT: int64 ids on the model's device, at least one per sequence.
        max_new_tokens: Number of tokens to yield; prompt and new tokens together fit ``max_seq_len``.
        temperature: 0 always takes the likeliest token, 1 draws as the model says, above flattens.
        top_k: Draw among that many likeliest tokens only; None among all.
        seed: Of the draws; None takes them from torch's default generator.

    Raises:
        ValueError: An empty prompt, a negative temperature, a ``top_k`` below 1, or more tokens than positions.
    """
    num_prompt = prompt_BT.shape[1]
    if num_prompt == 0:
        raise ValueError("generate: the prompt is empty; pass at least one token, such as the end mark")
    if num_prompt + max_new_tokens > model.config.max_seq_len:
        raise ValueError(
            f"generate: {num_prompt} prompt tokens and {max_new_tokens} new ones do not fit "
            f"max_seq_len={model.config.max_seq_len}; shorten one of them"
        )
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"generate: temperature={temperature} must not be negative, top_k={top_k} not below 1")
    generator = None if seed is None else torch.Generator(prompt_BT.device).manual_seed(seed)
    choose = partial(pick, temperature=temperature, top_k=top_k, generator=generator)
    return _tokens(model, prompt_BT, max_new_tokens, choose)


def _tokens(model: Llama, fed_BT: Tensor, num_new: int, choose: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    cache = new_cache(model, fed_BT.shape[0])
    for _ in range(num_new):
        was_training = model.training
        model.eval()
        with torch.no_grad():
            logits_BV = model(fed_BT, cache)[:, -1]
        model.train(was_training)
        tokens_B = choose(logits_BV)
        yield tokens_B
        fed_BT = tokens_B[:, None]
