"""Rotary positions against the reference, and the reference against what the decoder does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from danaus.actors.models.llama import rotate
from danaus.kernels import rope as module
from danaus.kernels.rope import rope, rope_reference

from ..agree import DTYPES, assert_agrees
from ..truth import Canaries, misaligned, poisoned_outputs, strided


def tables(num_positions: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin with the second half like the first, as Llama has them."""
    wavelength = 10_000.0 ** -(torch.arange(0, width, 2) / width)
    angle = torch.outer(torch.arange(num_positions).float(), wavelength).repeat(1, 2).to(device)
    return angle.cos(), angle.sin()


def heads(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """Tokens before heads in memory, as a projection leaves them."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


def columns_apart(x: torch.Tensor) -> torch.Tensor:
    return x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2), (2, 3, 5, 6), (1, 18, 3, 64), (2, 1, 37, 10), (0, 2, 3, 4), (2, 2, 0, 4)]
)
def test_it_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    cos, sin = tables(shape[2] + 2, shape[3], device)
    positions = torch.randint(0, shape[2] + 2, (shape[0], shape[2]), device=device)

    for chosen in (None, positions, positions[0] if shape[0] else None):
        assert_agrees(
            lambda x, chosen=chosen: rope(x, cos, sin, chosen),
            lambda x, chosen=chosen: rope_reference(x, cos, sin, chosen),
            (heads(shape, device, dtype),),
        )


@pytest.mark.parametrize("layout", [transposed, strided, misaligned, columns_apart])
def test_any_layout_will_do(layout: Any, device: torch.device) -> None:
    x = layout(heads((2, 3, 5, 6), device))
    cos, sin = tables(5, 6, device)

    assert_agrees(lambda x: rope(x, cos, sin), lambda x: rope_reference(x, cos, sin), (x,))


def test_a_projections_layout_is_kept(device: torch.device) -> None:
    x = transposed(heads((2, 3, 5, 6), device))

    assert rope(x, *tables(5, 6, device)).stride() == x.stride()


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_half_tables_are_enough(impl: Any, device: torch.device) -> None:
    x, (cos, sin) = heads((1, 2, 4, 8), device), tables(4, 8, device)

    assert torch.equal(rope(x, cos[:, :4], sin[:, :4], impl=impl), rope(x, cos, sin, impl=impl))


def test_the_reference_is_what_the_decoder_does(device: torch.device) -> None:
    x, (cos, sin) = heads((2, 3, 5, 8), device), tables(5, 8, device)

    torch.testing.assert_close(rope_reference(x, cos, sin), rotate(x, cos, sin))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("layout", [lambda x: x.detach(), lambda x: transposed(x).detach()])
def test_in_place_it_turns_its_input(impl: Any, layout: Any, device: torch.device) -> None:
    x, (cos, sin) = layout(heads((2, 3, 5, 6), device)), tables(5, 6, device)
    expected = rope_reference(x, cos, sin)

    assert rope(x, cos, sin, inplace=True, impl=impl) is x

    torch.testing.assert_close(x, expected)


def test_it_writes_only_its_results(device: torch.device) -> None:
    canaries = Canaries()
    x = canaries.around(heads((2, 3, 5, 6), device))

    rope(x, *tables(5, 6, device), inplace=True)

    canaries.check()
    assert not x.isnan().any()


def test_the_references_gradient_is_its_derivative() -> None:
    cos, sin = (table.double() for table in tables(4, 6, torch.device("cpu")))
    x = heads((1, 2, 3, 6), torch.device("cpu")).detach().double().requires_grad_()

    assert torch.autograd.gradcheck(lambda x: rope_reference(x, cos, sin, torch.tensor([3, 0, 1])), (x,))


@pytest.mark.timeout(60)
def test_torch_may_trace_it(device: torch.device) -> None:
    x, (cos, sin) = heads((1, 2, 3, 4), device), tables(3, 4, device)

    torch.library.opcheck(module._rope_op, (x, cos, sin, torch.arange(3, device=device), False))
    torch.library.opcheck(module._rope_inplace_op, (x.detach(), cos, sin, None))


def test_it_says_what_it_takes(device: torch.device) -> None:
    x, (cos, sin) = heads((2, 3, 5, 6), device), tables(5, 6, device)

    with pytest.raises(ValueError, match="E even"):
        rope(x[..., :5], cos, sin)
    with pytest.raises(ValueError, match=r"expected cos and sin \[S, 3\] or \[S, 6\]"):
        rope(x, cos[:, :2], sin[:, :2])
    with pytest.raises(ValueError, match="5 tokens, but the tables end at 4"):
        rope(x, cos[:4], sin[:4])
    with pytest.raises(ValueError, match=r"expected integer positions \[5\] or \[2, 5\]"):
        rope(x, cos, sin, torch.zeros(3, device=device, dtype=torch.int64))
    with pytest.raises(ValueError, match="inplace=True records no gradient"):
        rope(x, cos, sin, inplace=True)
    with pytest.raises(ValueError, match="it has 'reference', 'triton'"):
        rope(x, cos, sin, impl="torch")


@pytest.mark.gpu
def test_offsets_pass_two_to_the_31(device: torch.device) -> None:
    view = torch.zeros(1, 1, 2**24 + 2**10, 128, device=device, dtype=torch.bfloat16)
    view[0, 0, -1] = torch.randn(128, device=device)
    cos, sin = tables(16, 128, device)
    positions = torch.full((view.shape[2],), 7, device=device)

    with poisoned_outputs():
        y = rope(view, cos, sin, positions)

    torch.testing.assert_close(y[:, :, -1:], rope_reference(view[:, :, -1:], cos, sin, positions[-1:]))
    assert not y[:, :, :-1].any()
