"""The grouped product against a loop over the experts: every way to load, every layout, uneven and empty experts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from danaus.kernels.moe import grouped, grouped_mm, grouped_mm_reference
from danaus.kernels.tuning import using

from ..agree import DTYPES, assert_agrees
from ..truth import Canaries, misaligned, poisoned_outputs, strided

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP": 2}
"""Several tiles from few numbers; descriptors where the shape allows."""

COUNTS = {
    "uneven": [17, 1, 22],
    "empty experts": [0, 18, 0, 5, 0],
    "one has all": [0, 17],
    "nobody has any": [0, 0],
    "one expert": [9],
}


def inputs(
    counts: list[int], *, width: tuple[int, int], device: torch.device, dtype: torch.dtype, unused: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows, of which the last ``unused`` are no expert's, matrices and offsets."""
    num_in, num_out = width
    x = torch.randn(sum(counts) + unused, num_in, device=device, dtype=dtype, requires_grad=True)
    w = torch.randn(len(counts), num_in, num_out, device=device, dtype=dtype, requires_grad=True)
    offsets = torch.tensor([0, *counts], device=device).cumsum(0).int()
    return x, w, offsets


def transposed(w: torch.Tensor) -> torch.Tensor:
    """Return an equal tensor laid out with the other dim last."""
    return w.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(w.requires_grad)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("tma", [0, 1])
def test_it_equals_the_reference_for_any_counts(counts: list[int], tma: int, device: torch.device) -> None:
    x, w, offsets = inputs(counts, width=(32, 24), device=device, dtype=torch.float32, unused=3)
    config = {**SMALL, "TMA": tma}

    with using("grouped_mm", config), using("grouped_mm_weight_grad", config):
        assert_agrees(grouped_mm, grouped_mm_reference, (x, w, offsets))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [(64, 72), (20, 17)])
@pytest.mark.parametrize("layout", [lambda w: w, transposed])
def test_it_equals_the_reference_in_its_own_tiles(
    layout: Any, width: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    x, w, offsets = inputs([70, 0, 5], width=width, device=device, dtype=dtype)

    assert_agrees(grouped_mm, grouped_mm_reference, (x, layout(w), offsets))


@pytest.mark.parametrize(
    ("rows", "matrices"),
    [
        (strided, misaligned),
        (misaligned, strided),
        (lambda x: x.detach().t().clone().t().requires_grad_(), transposed),
        (strided, lambda w: strided(transposed(w).mT).mT),
    ],
)
def test_any_layout_will_do(rows: Any, matrices: Any, device: torch.device) -> None:
    x, w, offsets = inputs([3, 14], width=(16, 32), device=device, dtype=torch.float16)

    with using("grouped_mm", SMALL), using("grouped_mm_weight_grad", SMALL):
        assert_agrees(grouped_mm, grouped_mm_reference, (rows(x), matrices(w), offsets))


def test_few_rows_per_expert_take_smaller_tiles(device: torch.device) -> None:
    x, w, offsets = inputs([2, 0, 1, 3], width=(64, 130), device=device, dtype=torch.float16)

    assert grouped.default_config(torch.float16, 2)["BLOCK_M"] == 64
    assert_agrees(grouped_mm, grouped_mm_reference, (x, w, offsets))


def test_programs_share_the_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "num_sms", lambda device: 3)
    x, w, offsets = inputs([17, 0, 24], width=(32, 32), device=device, dtype=torch.float32, unused=2)

    with using("grouped_mm", SMALL), using("grouped_mm_weight_grad", SMALL):
        assert_agrees(grouped_mm, grouped_mm_reference, (x, w, offsets))


def test_the_gradient_of_the_weights_is_laid_out_as_they_are(device: torch.device) -> None:
    x, w, offsets = inputs([3, 2], width=(16, 32), device=device, dtype=torch.float32)

    for weights in (w, transposed(w)):
        (grad,) = torch.autograd.grad(grouped_mm(x, weights, offsets).sum(), weights)

        assert grad.stride() == weights.stride()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_stays_in_its_expert(device: torch.device) -> None:
    x, w, offsets = inputs([3, 20, 4], width=(20, 32), device=device, dtype=torch.float16, unused=2)
    with torch.no_grad():
        w[1] = float("nan")
        x[3:23] = float("inf")
        x[27:] = float("nan")

    for tma in (0, 1):
        with poisoned_outputs(), using("grouped_mm", {**SMALL, "TMA": tma}):
            y = grouped_mm(x[:, :16], w[:, :16], offsets)
            full = grouped_mm(x, w, offsets)
        with poisoned_outputs(), using("grouped_mm_weight_grad", {**SMALL, "TMA": tma}):
            dw = grouped._weight_grad_op(x[:, :16], y.nan_to_num(), offsets)

        for result in (y, full):
            assert result[:3].isfinite().all()
            assert result[23:].isfinite().all()
            assert not result[27:].any()
        assert dw[0].isfinite().all()
        assert dw[2].isfinite().all()


def test_it_writes_only_its_results(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = Canaries()
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: canaries.around(make(*shape, **options)))
    x, w, offsets = inputs([5, 0, 3], width=(20, 17), device=device, dtype=torch.float32, unused=2)

    y = grouped_mm(x, w, offsets)
    torch.autograd.grad(y, (x, w), y.detach())

    canaries.check()


def test_offsets_that_lie_read_and_write_nothing_outside(device: torch.device) -> None:
    canaries = Canaries()
    x, w, _ = inputs([5, 3], width=(16, 16), device=device, dtype=torch.float32)
    rows, matrices = canaries.around(x), canaries.around(w)

    y = grouped_mm(rows, matrices, torch.tensor([-5, 20, 10], device=device, dtype=torch.int32))

    assert y.isfinite().all()
    canaries.check()


def test_the_same_bits_every_time(device: torch.device) -> None:
    x, w, offsets = inputs([17, 3], width=(32, 17), device=device, dtype=torch.float32)

    def results() -> tuple[torch.Tensor, ...]:
        y = grouped_mm(x, w, offsets)
        return (y, *torch.autograd.grad(y, (x, w), torch.ones_like(y)))

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))


def test_torchs_own_and_a_loop_are_the_same(device: torch.device) -> None:
    x, w, offsets = inputs([9, 0, 7], width=(16, 32), device=device, dtype=torch.float16, unused=2)

    def loop(x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        used = [x[a:b] @ w[e] for e, (a, b) in enumerate(pairwise(offsets.tolist()))]
        return torch.cat([*used, x.new_zeros(2, 32)])

    assert_agrees(lambda *args: grouped_mm(*args, impl="torch"), grouped_mm_reference, (x, w, offsets))
    assert_agrees(loop, grouped_mm_reference, (x, w, offsets))


def test_the_references_gradient_is_its_derivative() -> None:
    x, w, offsets = inputs([2, 0, 1], width=(3, 2), device=torch.device("cpu"), dtype=torch.float64, unused=1)

    assert torch.autograd.gradcheck(lambda x, w: grouped_mm_reference(x, w, offsets), (x, w))


@pytest.mark.timeout(60)
def test_torch_may_trace_it(device: torch.device) -> None:
    x, w, offsets = inputs([2, 0, 1], width=(3, 2), device=device, dtype=torch.float32)

    torch.library.opcheck(grouped._grouped_op, (x, w, offsets))
    torch.library.opcheck(grouped._grouped_op, (x, transposed(w), offsets))


def test_it_says_what_it_takes(device: torch.device) -> None:
    x, w, offsets = inputs([2, 1], width=(3, 2), device=device, dtype=torch.float32)

    with pytest.raises(ValueError, match=r"got \[3, 3\] and \[2, 2, 3\]"):
        grouped_mm(x, w.mT, offsets)
    with pytest.raises(ValueError, match=r"expected offsets \[3\] of int32, got \[2\]"):
        grouped_mm(x, w, offsets[1:])
    with pytest.raises(ValueError, match=r"got \[3\] torch\.int64"):
        grouped_mm(x, w, offsets.long())
    with pytest.raises(ValueError, match="cast one of them"):
        grouped_mm(x.half(), w, offsets)
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        grouped_mm(x.double(), w.double(), offsets)


@pytest.mark.gpu
def test_large_tiles_agree_in_bf16(device: torch.device) -> None:
    counts = [256, 0, 300, 1000, 1, 64]
    x, w, offsets = inputs(counts, width=(512, 768), device=device, dtype=torch.bfloat16, unused=100)

    assert_agrees(grouped_mm, grouped_mm_reference, (x, w, offsets))
    assert_agrees(grouped_mm, grouped_mm_reference, (x, transposed(w), offsets))


@pytest.mark.gpu
def test_offsets_pass_two_to_the_31(device: torch.device) -> None:
    num_rows, width = 2**31 // 4096 + 8, 4096
    x = torch.zeros(num_rows, width, device=device, dtype=torch.bfloat16)
    x[-1] = torch.randn(width, device=device)
    w = torch.randn(2, width, width, device=device, dtype=torch.bfloat16)
    offsets = torch.tensor([0, num_rows - 1, num_rows], device=device, dtype=torch.int32)

    for tma in (0, 1):
        with poisoned_outputs(), using("grouped_mm", {"TMA": tma}):
            y = grouped_mm(x, w, offsets)

        torch.testing.assert_close(y[-1:], x[-1:] @ w[1])
        assert not y[:-1].any()
