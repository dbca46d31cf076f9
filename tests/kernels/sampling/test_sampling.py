"""Sampling: the kernel draws what the reference draws, and the reference draws with the right probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from danaus.kernels import tuning
from danaus.kernels.sampling import api as module
from danaus.kernels.sampling import kept_reference, philox_reference, sample, sample_reference

from ..agree import DTYPES
from ..truth import misaligned, poisoned_outputs, strided

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.5},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"temperature": 1.5, "top_k": 10, "top_p": 0.8, "min_p": 0.05},
]


@pytest.fixture(autouse=True)
def many_rows_a_program() -> Any:
    """The interpreter takes its time per program, whatever that holds."""
    with tuning.using("sampling", {"ROWS": 16, "BLOCK": 64}):
        yield


def logits(num_rows: int, vocab: int, device: torch.device) -> torch.Tensor:
    return 2 * torch.randn(num_rows, vocab, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", FILTERS)
def test_it_draws_what_the_reference_draws(options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    z = logits(13, 75, device).to(dtype)

    with poisoned_outputs():
        got = sample(z, seed=3, position=7, **options)

    assert torch.equal(got, sample_reference(z, seed=3, position=7, **options))


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (2, 3)])
def test_odd_shapes_are_drawn_from_too(shape: tuple[int, int], device: torch.device) -> None:
    z = logits(*shape, device)

    assert torch.equal(sample(z, seed=0, top_k=2), sample_reference(z, seed=0, top_k=2))


@pytest.mark.parametrize("layout", [strided, misaligned])
def test_any_layout_of_the_rows_will_do(layout: Any, device: torch.device) -> None:
    z = logits(5, 40, device)

    assert torch.equal(sample(layout(z), seed=0), sample(z, seed=0))


def test_every_row_may_have_its_own_options(device: torch.device) -> None:
    z = logits(4, 40, device)
    options: dict[str, Any] = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0], device=device),
        "top_k": torch.tensor([0, 3, 1, 40], device=device),
        "top_p": torch.tensor([1.0, 0.9, 0.5, 0.2], device=device),
        "min_p": torch.tensor([0.0, 0.0, 1.0, 0.1], device=device),
        "seed": torch.tensor([5, 6, 7, 1 << 40], device=device),
        "position": torch.tensor([0, 1, 2, 3], device=device),
    }

    together = sample(z, **options)

    alone = [sample(z[i : i + 1], **{name: value[i : i + 1] for name, value in options.items()}) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, sample_reference(z, **options))


def test_temperature_zero_takes_the_first_of_the_likeliest(device: torch.device) -> None:
    z = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]], device=device)

    assert sample(z, seed=1, temperature=0.0).tolist() == [1, 0]


def test_min_p_of_one_keeps_the_likeliest(device: torch.device) -> None:
    z = logits(6, 40, device)

    assert torch.equal(sample(z, seed=1, min_p=1.0), z.argmax(-1))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_tokens_that_are_ruled_out_are_never_drawn(device: torch.device) -> None:
    z = torch.full((9, 40), float("-inf"), device=device)
    z[:8, 33] = 0.0

    filters: list[dict[str, Any]] = [{}, {"top_k": 3, "top_p": 0.5}]
    for options in filters:
        assert sample(z, seed=1, **options).tolist() == [33] * 8 + [-1]


def test_another_position_or_seed_draws_anew(device: torch.device) -> None:
    z = torch.zeros(20, 100, device=device)

    draws = [sample(z, seed=seed, position=position) for seed, position in ((0, 0), (0, 1), (100, 0), (0, 0))]

    assert torch.equal(draws[0], draws[3])
    assert (draws[0] != draws[1]).any()
    assert (draws[0] != draws[2]).any()


@pytest.mark.parametrize("options", FILTERS)
def test_the_reference_draws_with_the_probabilities_that_were_kept(options: dict[str, Any]) -> None:
    num_draws, row = 20_000, 2 * torch.randn(1, 12)

    drawn = sample_reference(row.expand(num_draws, -1), seed=11, **options)

    expected = kept_reference(row, **options)[0] * num_draws
    counts = torch.bincount(drawn, minlength=12)
    assert not counts[expected == 0].any()
    # Chi-square with at most 11 degrees of freedom: beyond 31 once in a thousand.
    seen = expected > 0
    assert ((counts - expected)[seen].square() / expected[seen]).sum() < 31


def test_what_is_kept_is_what_the_filters_say() -> None:
    z = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()

    def kept(**options: Any) -> list[float]:
        return [round(p, 4) for p in kept_reference(z, **options)[0].tolist()]

    assert kept() == [0.5, 0.25, 0.15, 0.1]
    assert kept(top_k=2) == [0.6667, 0.3333, 0.0, 0.0]
    assert kept(top_p=0.6) == [0.6667, 0.3333, 0.0, 0.0]
    assert kept(top_p=0.8) == [0.5556, 0.2778, 0.1667, 0.0]
    # Of the two that top-k keeps, the first has two thirds already.
    assert kept(top_k=2, top_p=0.6) == [1.0, 0.0, 0.0, 0.0]
    assert kept(min_p=0.25) == [0.5556, 0.2778, 0.1667, 0.0]
    assert kept(temperature=0.0) == [1.0, 0.0, 0.0, 0.0]
    assert kept(temperature=0.5) == [0.7246, 0.1812, 0.0652, 0.029]


def test_philox_is_the_published_one() -> None:
    # Random123's known answers for philox4x32-10 have four free counters; zero and the key alone are ours.
    zero = torch.tensor(0)

    assert philox_reference(zero, zero, zero).item() == 0x6627E8D5


@pytest.mark.timeout(60)
def test_torch_may_trace_it(device: torch.device) -> None:
    z = logits(3, 9, device)
    seed, ones = torch.arange(3, device=device), torch.ones(3, device=device)

    torch.library.opcheck(module._sample_op, (z, seed, seed, ones, ones, ones, None, ones))


def test_it_says_what_it_takes(device: torch.device) -> None:
    z = logits(3, 9, device)

    with pytest.raises(ValueError, match=r"expected logits \[B, V\], V from 1"):
        sample(z[0], seed=0)
    with pytest.raises(ValueError, match=r"top_p=1.5 is outside of \[0, 1\]"):
        sample(z, seed=0, top_p=1.5)
    with pytest.raises(ValueError, match=r"temperature=-1 is outside of \[0, inf\]"):
        sample(z, seed=0, temperature=-1)
    with pytest.raises(ValueError, match=r"expected top_k \[3\]"):
        sample(z, seed=0, top_k=torch.ones(2, device=device))
    with pytest.raises(ValueError, match=r"expected seed and position \[3\]"):
        sample(z, seed=torch.zeros(2, device=device, dtype=torch.int64))
    with pytest.raises(ValueError, match="it has 'reference', 'triton'"):
        sample(z, seed=0, impl="torch")
