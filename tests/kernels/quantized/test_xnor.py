"""XNOR against integer references: packing signs, counting bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from danaus.kernels.quantized import BinaryRows, binary_quantize, binary_signs, xnor_linear, xnor_matmul
from danaus.kernels.quantized import binary as module

from ..agree import DTYPES, assert_agrees
from ..truth import Canaries, misaligned, odd_shapes, poisoned_outputs, strided


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*odd_shapes(), (2, 5000)])
def test_signs_are_packed_to_the_references_bits(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    x[:, 0] = -0.0

    with poisoned_outputs():
        got = binary_quantize(x)
    expected = binary_quantize(x, impl="reference")

    assert torch.equal(got.packed, expected.packed)
    assert torch.allclose(got.scale, expected.scale, rtol=1e-5, atol=0)
    assert torch.equal(binary_signs(got), torch.where(x < 0, -1, 1).to(torch.int8))


@pytest.mark.parametrize(("tokens", "outputs", "features"), [(1, 1, 1), (1, 40, 128), (3, 33, 130), (2, 5, 3000)])
def test_products_are_exact(tokens: int, outputs: int, features: int, device: torch.device) -> None:
    x, w = (binary_quantize(torch.randn(rows, features, device=device)) for rows in (tokens, outputs))

    with poisoned_outputs():
        got = xnor_matmul(x, w)

    assert got.dtype == torch.int32
    assert torch.equal(got, xnor_matmul(x, w, impl="reference"))
    assert torch.equal(got.cpu(), (binary_signs(x).cpu().long() @ binary_signs(w).cpu().long().T).int())


@pytest.mark.parametrize("bits", [0, 1, 0x80000000, 0xFFFFFFFF, 0x0F0F0F0F, 0xDEADBEEF])
def test_bits_are_counted_in_every_place(bits: int, device: torch.device) -> None:
    signed = bits - 2**32 if bits >= 2**31 else bits
    words = torch.tensor([[signed, 0, 0, 0]], dtype=torch.int32, device=device).view(torch.uint8)
    none = torch.zeros_like(words)
    x, w = (BinaryRows(packed, torch.ones(1, device=device), 128) for packed in (words, none))

    assert xnor_matmul(x, w).item() == 128 - 2 * bits.bit_count()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.clone, strided, misaligned, lambda x: x.t().clone().t()])
def test_the_whole_equals_the_reference(layout: Any, dtype: torch.dtype, device: torch.device) -> None:
    weight = binary_quantize(torch.randn(21, 150, device=device))
    moved = weight._replace(packed=layout(weight.packed))
    x = layout(torch.randn(3, 150, device=device, dtype=dtype))

    assert_agrees(lambda x: xnor_linear(x, moved), lambda x: module.xnor_linear_reference(x, weight), (x,))


def test_leading_dims_are_kept_and_nothing_is_nothing(device: torch.device) -> None:
    weight, none = (binary_quantize(torch.randn(rows, 20, device=device)) for rows in (4, 0))

    assert xnor_linear(torch.randn(2, 3, 20, device=device), weight).shape == (2, 3, 4)
    assert xnor_linear(torch.randn(20, device=device), weight).shape == (4,)
    assert xnor_linear(torch.randn(0, 20, device=device), weight).shape == (0, 4)
    assert xnor_linear(torch.randn(2, 20, device=device), none).shape == (2, 0)


def test_nothing_around_the_buffers_is_read_or_written(device: torch.device) -> None:
    canaries = Canaries()
    weight, x = binary_quantize(torch.randn(5, 70, device=device)), torch.randn(3, 70, device=device)
    guarded = weight._replace(packed=canaries.around(weight.packed), scale=canaries.around(weight.scale))

    assert torch.equal(xnor_linear(canaries.around(x), guarded), xnor_linear(x, weight))
    canaries.check()


def test_the_operators_are_registered_whole(device: torch.device) -> None:
    x, w = torch.randn(2, 70, device=device), binary_quantize(torch.randn(3, 70, device=device))
    packed, scale = module.sign_op(x)

    torch.library.opcheck(module.sign_op, (x,))
    torch.library.opcheck(module.xnor_op, (packed, w.packed, scale, w.scale, 70, torch.float16))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x, w = (binary_quantize(torch.randn(3, features, device=device)) for features in (64, 65))
    with pytest.raises(ValueError, match="rows of 64 and of 65 signs"):
        xnor_matmul(x, w)
    with pytest.raises(ValueError, match=r"expected x \[..., 65\]"):
        xnor_linear(torch.randn(2, 64, device=device), w)
    with pytest.raises(ValueError, match="make them with binary_quantize"):
        xnor_matmul(x, w._replace(scale=w.scale.double()))
