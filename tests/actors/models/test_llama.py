"""The decoder and its parts against references written in another way."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from danaus.actors.models import Llama, LlamaConfig, RMSNorm, base, next_token_loss, small, tiny
from danaus.actors.models.llama import Attention, FeedForward, causal_mask, rope_tables, rotate

pytestmark = pytest.mark.torch


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rope_reference(x: torch.Tensor, first: int, theta: float) -> torch.Tensor:
    """Rotary positions as a product of complex numbers: element i is the real part, i + E/2 the imaginary one."""
    half = x.shape[-1] // 2
    as_complex = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = torch.empty_like(as_complex)
    for t in range(x.shape[-2]):
        for i in range(half):
            angle = (first + t) * theta ** (-2 * i / x.shape[-1])
            turned[..., t, i] = as_complex[..., t, i] * complex(math.cos(angle), math.sin(angle))
    return torch.cat((turned.real, turned.imag), dim=-1).float()


def attention_reference(module: Attention, x: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """One head, one query at a time, with a softmax over what it may see."""
    width, per_kv = config.head_width, config.num_heads // config.num_kv_heads
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        queries, keys, values = (x[b] @ proj.weight.T for proj in (module.q_proj, module.k_proj, module.v_proj))
        for head in range(config.num_heads):
            kv = slice(head // per_kv * width, (head // per_kv + 1) * width)
            q = rope_reference(queries[:, head * width : (head + 1) * width], 0, config.rope_theta)
            k = rope_reference(keys[:, kv], 0, config.rope_theta)
            for t in range(x.shape[1]):
                weights = torch.softmax(k[: t + 1] @ q[t] / math.sqrt(width), dim=0)
                out[b, t, head * width : (head + 1) * width] = weights @ values[: t + 1, kv]
    return out @ module.o_proj.weight.T


def test_rms_norm_divides_by_the_root_of_the_mean_square() -> None:
    norm = RMSNorm(6, eps=1e-5)
    norm.weight.data.copy_(torch.arange(1.0, 7.0))
    x = normal(3, 6) * 10

    rows = [
        [v / math.sqrt(sum(u * u for u in row) / 6 + 1e-5) * (i + 1) for i, v in enumerate(row)] for row in x.tolist()
    ]

    torch.testing.assert_close(norm(x), torch.tensor(rows))


def test_rms_norm_computes_in_fp32_and_returns_its_input_dtype() -> None:
    x = (normal(2, 8) * 1e-3).to(torch.bfloat16)

    normalised = RMSNorm(8, eps=1e-5).to(torch.bfloat16)(x)

    assert normalised.dtype == torch.bfloat16
    torch.testing.assert_close(normalised, RMSNorm(8, eps=1e-5)(x.float()).to(torch.bfloat16))


@pytest.mark.parametrize("first", [0, 5])
def test_rope_equals_a_complex_rotation(first: int) -> None:
    config = tiny()
    x = normal(2, 3, 7, config.head_width)

    turned = rotate(x, *rope_tables(first, 7, config, x.device))

    torch.testing.assert_close(turned, rope_reference(x, first, config.rope_theta))


def test_rope_scores_depend_on_the_distance_alone() -> None:
    config = tiny()
    q, k = normal(1, 1, 1, config.head_width), normal(1, 1, 1, config.head_width, seed=1)

    def score(q_at: int, k_at: int) -> float:
        turned_q = rotate(q, *rope_tables(q_at, 1, config, q.device))
        return float((turned_q * rotate(k, *rope_tables(k_at, 1, config, k.device))).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_shares_key_and_value_heads_among_neighbouring_queries(num_kv_heads: int) -> None:
    config = dataclasses.replace(tiny(), num_kv_heads=num_kv_heads)
    torch.manual_seed(0)
    module = Attention(config)
    x = normal(2, 6, config.width)

    out = module(x, rope_tables(0, 6, config, x.device), None, 0)

    torch.testing.assert_close(out, attention_reference(module, x, config), atol=1e-5, rtol=1e-5)


def test_feed_forward_is_swiglu() -> None:
    torch.manual_seed(0)
    module = FeedForward(tiny())
    x = normal(5, 32)
    gate, up = x @ module.gate_proj.weight.T, x @ module.up_proj.weight.T

    torch.testing.assert_close(module(x), (gate / (1 + torch.exp(-gate)) * up) @ module.down_proj.weight.T)


def test_causal_mask_lets_a_token_see_itself_and_what_is_before_it() -> None:
    expected = [[True, True, True, False, False], [True, True, True, True, False], [True] * 5]

    assert causal_mask(3, 2, torch.device("cpu")).tolist() == expected


def test_no_token_sees_a_later_one() -> None:
    model = Llama(tiny())
    model.init_weights(0)
    tokens = torch.arange(12).reshape(1, 12)
    changed = tokens.clone()
    changed[0, 7:] = 99

    torch.testing.assert_close(model(tokens)[:, :7], model(changed)[:, :7])


def test_a_tied_head_has_the_weights_of_the_embedding() -> None:
    tied, untied = Llama(tiny()), Llama(dataclasses.replace(tiny(), tied_head=False))

    assert tied.lm_head is None
    assert untied.num_parameters() - tied.num_parameters() == 256 * 32


def test_weights_depend_on_the_seed_alone() -> None:
    first, same, other = Llama(tiny()), Llama(tiny()), Llama(tiny())
    first.init_weights(1)
    torch.manual_seed(5)
    same.init_weights(1)
    other.init_weights(2)

    assert torch.equal(first.embed_tokens.weight, same.embed_tokens.weight)
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)


def test_a_model_made_on_the_meta_device_works_once_it_has_memory_and_weights() -> None:
    with torch.device("meta"):
        model = Llama(tiny())
    model.to_empty(device="cpu").init_weights(0)
    plain = Llama(tiny())
    plain.init_weights(0)

    tokens = torch.arange(8).reshape(1, 8)
    assert torch.equal(model(tokens), plain(tokens))


def test_loss_is_the_sum_of_the_negative_log_likelihoods() -> None:
    logits, targets = normal(2, 3, 5), torch.tensor([[0, 4, 2], [1, 1, 3]])

    expected = sum(
        math.log(sum(math.exp(v) for v in logits[b, t].tolist())) - float(logits[b, t, targets[b, t]])
        for b in range(2)
        for t in range(3)
    )

    assert float(next_token_loss(logits, targets)) == pytest.approx(expected, rel=1e-6)


def test_a_sequence_longer_than_the_model_is_refused_with_both_lengths() -> None:
    with pytest.raises(ValueError, match="65 tokens do not fit max_seq_len=64"):
        Llama(tiny())(torch.zeros(1, 65, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "use a multiple of 6"),
        ({"num_kv_heads": 3}, "use a divisor"),
        ({"dropout": 1.0}, r"outside of \[0, 1\)"),
    ],
)
def test_a_config_that_does_not_fit_itself_says_what_would(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny(), **changes)


def test_presets_have_the_sizes_that_they_promise() -> None:
    with torch.device("meta"):
        sizes = [Llama(preset).num_parameters() for preset in (tiny(), small(), base())]

    embedding = 32_768 * 768
    assert sizes[0] == pytest.approx(30e3, rel=0.1)
    assert sizes[1] == pytest.approx(0.75e6, rel=0.1)
    assert sizes[2] - embedding == pytest.approx(100e6, rel=0.1)
