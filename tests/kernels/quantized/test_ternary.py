"""W2A8 against integer references: words and dp4a for one token, int8 products for more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from danaus.kernels.quantized import ternary as module
from danaus.kernels.quantized import (
    ternary_dequantize,
    ternary_linear,
    ternary_matmul,
    ternary_quantize,
    ternary_unpack,
)
from danaus.kernels.tuning import using

from ..agree import DTYPES
from ..truth import Canaries, misaligned, poisoned_outputs, strided


def weights(outputs: int, features: int, device: torch.device) -> module.TernaryWeight:
    return ternary_quantize(torch.randn(outputs, features, device=device))


def test_values_are_the_clamped_quotients_and_survive_packing(device: torch.device) -> None:
    w = torch.randn(5, 77, device=device)

    weight = ternary_quantize(w)

    expected = (w / w.abs().mean()).round().clamp(-1, 1)
    assert torch.equal(ternary_unpack(weight), expected.to(torch.int8))
    assert torch.equal(module.ternary_pack(ternary_unpack(weight)), weight.packed)
    assert torch.equal(ternary_dequantize(weight), expected * w.abs().mean())
    assert ternary_unpack(ternary_quantize(torch.zeros(2, 3, device=device))).count_nonzero() == 0


@pytest.mark.parametrize("tokens", [1, 2, 19])
@pytest.mark.parametrize(("outputs", "features"), [(1, 1), (5, 65), (33, 300)])
def test_products_are_exact(tokens: int, outputs: int, features: int, device: torch.device) -> None:
    x = torch.randint(-128, 128, (tokens, features), device=device, dtype=torch.int8)
    weight = weights(outputs, features, device)

    with poisoned_outputs():
        got = ternary_matmul(x, weight)

    assert torch.equal(got, ternary_matmul(x, weight, impl="reference"))
    assert torch.equal(got.cpu(), (x.cpu().long() @ ternary_unpack(weight).cpu().long().T).int())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 6])
def test_the_whole_is_the_references_bits(tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = torch.randn(tokens, 130, device=device, dtype=dtype), weights(21, 130, device)

    with poisoned_outputs():
        got = ternary_linear(x, weight)

    assert got.dtype == dtype
    assert torch.equal(got, ternary_linear(x, weight, impl="reference"))


def test_k_may_be_split(device: torch.device) -> None:
    x, weight = torch.randn(1, 700, device=device), weights(9, 700, device)

    with using("ternary_gemv", {"SPLIT": 3, "WORDS": 16}), poisoned_outputs():
        assert torch.equal(ternary_linear(x, weight), ternary_linear(x, weight, impl="reference"))


@pytest.mark.parametrize("layout", [strided, misaligned, lambda x: x.t().clone().t()])
@pytest.mark.parametrize("tokens", [1, 3])
def test_any_layout_will_do(layout: Any, tokens: int, device: torch.device) -> None:
    x, weight = torch.randn(tokens, 128, device=device), weights(4, 128, device)
    moved = weight._replace(packed=layout(weight.packed))

    assert torch.equal(ternary_linear(layout(x), moved), ternary_linear(x, weight))


def test_leading_dims_are_kept_and_nothing_is_nothing(device: torch.device) -> None:
    weight, none = weights(4, 20, device), weights(0, 20, device)

    assert ternary_linear(torch.randn(2, 3, 20, device=device), weight).shape == (2, 3, 4)
    assert ternary_linear(torch.randn(20, device=device), weight).shape == (4,)
    assert ternary_linear(torch.randn(0, 20, device=device), weight).shape == (0, 4)
    assert ternary_linear(torch.randn(2, 20, device=device), none).shape == (2, 0)


def test_nothing_around_the_buffers_is_read_or_written(device: torch.device) -> None:
    canaries = Canaries()
    weight = weights(5, 70, device)
    guarded = weight._replace(packed=canaries.around(weight.packed), scale=canaries.around(weight.scale))
    for tokens in (1, 3):
        x = torch.randn(tokens, 70, device=device)

        assert torch.equal(ternary_linear(canaries.around(x), guarded), ternary_linear(x, weight))
    canaries.check()


def test_the_operator_is_registered_whole(device: torch.device) -> None:
    weight = weights(4, 70, device)
    for tokens in (1, 3):
        x = torch.randint(-128, 128, (tokens, 70), device=device, dtype=torch.int8)
        scale = torch.rand(tokens, device=device)

        torch.library.opcheck(module.ternary_op, (x, weight.packed, scale, weight.scale, torch.float16))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x, weight = torch.randn(3, 20, device=device), weights(4, 20, device)
    with pytest.raises(ValueError, match=r"expected x \[..., 20\]"):
        ternary_linear(x[:, :7], weight)
    with pytest.raises(ValueError, match=r"expected int8 \[M, 20\]"):
        ternary_matmul(x, weight)
    with pytest.raises(ValueError, match="make it with ternary_quantize"):
        ternary_linear(x, weight._replace(features=65))
    with pytest.raises(ValueError, match="codes from -1 to 1"):
        module.ternary_pack(torch.tensor([[-2, 0]]))


@pytest.mark.gpu
def test_offsets_have_64_bits() -> None:
    device = torch.device("cuda")
    outputs, features = 2**17, 2**16 + 4096
    packed = torch.randint(256, (outputs, features // 4), device=device, dtype=torch.uint8)
    # There is no code 3: of two set bits the lower one goes.
    packed &= ~((packed & 0x55) & ((packed >> 1) & 0x55))
    weight = module.TernaryWeight(packed, torch.ones(1, device=device), features)
    last = weight._replace(packed=packed[-64:])
    for tokens in (1, 16):
        x = torch.randint(-128, 128, (tokens, features), device=device, dtype=torch.int8)

        got = ternary_matmul(x, weight)[:, -64:]

        assert torch.equal(got, ternary_matmul(x, last, impl="reference"))
