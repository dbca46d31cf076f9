"""int4, NF4 and BWN against their references: one token, few, many, K split or not, gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from danaus.kernels.quantized import (
    binary_dequantize,
    binary_linear,
    binary_quantize,
    int4_dequantize,
    int4_linear,
    int4_quantize,
    nf4_dequantize,
    nf4_linear,
    nf4_quantize,
    unpack_bits,
)
from danaus.kernels.quantized import weight_only as module
from danaus.kernels.quantized.nf4 import nf4_scales
from danaus.kernels.tuning import using

from ..agree import DTYPES, assert_agrees
from ..truth import Canaries, misaligned, poisoned_outputs, strided

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Format:
    """One format as the tests use it."""

    scheme: str
    quantize: Callable[..., Any]
    dequantize: Callable[..., torch.Tensor]
    linear: Callable[..., torch.Tensor]
    features: int
    """A width that fills neither whole tiles nor a power of two."""


FORMATS = {
    "int4": Format("int4", partial(int4_quantize, group=64), int4_dequantize, int4_linear, 192),
    "int4-zero": Format("int4", partial(int4_quantize, group=32, symmetric=False), int4_dequantize, int4_linear, 96),
    "int4-row": Format("int4", partial(int4_quantize, group=96), int4_dequantize, int4_linear, 96),
    "nf4": Format("nf4", nf4_quantize, nf4_dequantize, nf4_linear, 192),
    "binary": Format("binary", partial(binary_quantize, impl="reference"), binary_dequantize, binary_linear, 150),
}
every_format = pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)


def assert_linear_agrees(kind: Format, x: torch.Tensor, weight: Any, what: str = "") -> None:
    assert_agrees(lambda x: kind.linear(x, weight), lambda x: kind.linear(x, weight, impl="reference"), (x,), what)


@pytest.mark.parametrize("dtype", DTYPES)
@every_format
def test_it_equals_the_reference_with_gradients(kind: Format, dtype: torch.dtype, device: torch.device) -> None:
    for tokens, outputs in ((1, 40), (2, 21), (19, 17)):
        x = torch.randn(tokens, kind.features, device=device, dtype=dtype, requires_grad=True)
        weight = kind.quantize(torch.randn(outputs, kind.features, device=device, dtype=dtype))

        assert_linear_agrees(kind, x, weight, f"{tokens} x {outputs}")


@every_format
def test_the_references_gradient_is_right(kind: Format) -> None:
    x = torch.randn(2, kind.features, dtype=torch.float64, requires_grad=True)
    weight = kind.quantize(torch.randn(3, kind.features))

    assert torch.autograd.gradcheck(lambda x: kind.linear(x, weight, impl="reference"), x, fast_mode=True)


@every_format
def test_bf16_is_not_garbage_in_the_interpreter(kind: Format, device: torch.device) -> None:
    weight = kind.quantize(torch.randn(9, kind.features, device=device))
    for tokens in (1, 3):
        x = torch.randn(tokens, kind.features, device=device, dtype=torch.bfloat16)
        expected = kind.linear(x.float(), weight, impl="reference")

        assert (kind.linear(x, weight) - expected).norm() < 0.02 * expected.norm()


@every_format
def test_k_may_be_split(kind: Format, device: torch.device) -> None:
    weight = kind.quantize(torch.randn(40, kind.features, device=device))
    for tokens, path in ((1, "gemv"), (3, "gemm")):
        x = torch.randn(tokens, kind.features, device=device, requires_grad=True)
        with using(f"{kind.scheme}_{path}", {"SPLIT": 3, "TILE_BYTES": 16}):
            first, second = kind.linear(x, weight), kind.linear(x, weight)

            assert_linear_agrees(kind, x, weight, path)
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES[1:]])
@every_format
def test_the_kernel_dequantizes_to_the_references_bits(kind: Format, dtype: torch.dtype, device: torch.device) -> None:
    weight = kind.quantize(torch.randn(21, kind.features, device=device))

    with poisoned_outputs():
        got = kind.dequantize(weight, dtype)

    assert got.dtype == dtype
    assert torch.equal(got, kind.dequantize(weight, dtype, impl="reference"))


@every_format
def test_rounding_is_to_the_nearest_value(kind: Format, device: torch.device) -> None:
    w = torch.randn(6, kind.features, device=device)

    weight = kind.quantize(w)

    error = (kind.dequantize(weight, impl="reference") - w).norm() / w.norm()
    assert error < (0.65 if kind.scheme == "binary" else 0.15)
    again = kind.quantize(kind.dequantize(weight, impl="reference"))
    assert torch.equal(again.packed, weight.packed)


@every_format
@pytest.mark.parametrize("layout", [strided, misaligned, lambda x: x.t().clone().t()])
def test_any_layout_of_the_rows_will_do(kind: Format, layout: Any, device: torch.device) -> None:
    x = layout(torch.randn(3, kind.features, device=device))

    assert_linear_agrees(kind, x, kind.quantize(torch.randn(40, kind.features, device=device)))


@every_format
def test_leading_dims_are_kept_and_nothing_is_nothing(kind: Format, device: torch.device) -> None:
    weight = kind.quantize(torch.randn(4, kind.features, device=device))
    none = kind.quantize(torch.randn(0, kind.features, device=device))

    assert kind.linear(torch.randn(2, 1, 3, kind.features, device=device), weight).shape == (2, 1, 3, 4)
    assert kind.linear(torch.randn(kind.features, device=device), weight).shape == (4,)
    assert kind.linear(torch.randn(0, 3, kind.features, device=device), weight).shape == (0, 3, 4)
    assert kind.linear(torch.randn(2, kind.features, device=device), none).shape == (2, 0)
    assert kind.dequantize(none).shape == (0, kind.features)


@every_format
def test_nothing_around_the_buffers_is_read_or_written(kind: Format, device: torch.device) -> None:
    canaries = Canaries()
    weight = kind.quantize(torch.randn(5, kind.features, device=device))
    guarded = type(weight)(*(canaries.around(part) if isinstance(part, torch.Tensor) else part for part in weight))
    for tokens in (1, 3):
        x = torch.randn(tokens, kind.features, device=device)

        got = kind.linear(canaries.around(x), guarded)

        assert torch.equal(got, kind.linear(x, weight))
        canaries.check()


@every_format
def test_the_operators_are_registered_whole(kind: Format, device: torch.device) -> None:
    weight = kind.quantize(torch.randn(3, kind.features, device=device))
    parts = [*weight][: 2 if kind.scheme == "binary" else None]
    arguments = {"int4": [*parts, None, None], "nf4": [*parts[:2], None, *parts[2:]], "binary": [*parts] + [None] * 3}
    group = {"int4": getattr(weight, "group", 0), "nf4": 64, "binary": kind.features}[kind.scheme]
    x = torch.randn(2, kind.features, device=device, requires_grad=True)

    torch.library.opcheck(module.matmul_op, (x, *arguments[kind.scheme], kind.scheme, group))
    torch.library.opcheck(
        module.dequantize_op,
        (*arguments[kind.scheme], kind.scheme, group, kind.features, torch.float16),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_int4_uses_all_codes_and_keeps_zero(device: torch.device) -> None:
    w = torch.randn(8, 128, device=device)
    w[:, 5] = 0
    symmetric, zeros = int4_quantize(w, group=128), int4_quantize(w + 3, group=128, symmetric=False)

    assert unpack_bits(symmetric.packed, 4, 128).amax() == 15
    assert int4_dequantize(symmetric)[:, 5].count_nonzero() == 0
    assert zeros.zero is not None
    assert (unpack_bits(zeros.packed, 4, 128).amax(1) == 15).all()
    assert int4_dequantize(int4_quantize(torch.zeros(1, 32, device=device), group=32)).count_nonzero() == 0


def test_int4_errors_stay_below_half_a_step(device: torch.device) -> None:
    w = torch.randn(8, 256, device=device)
    for symmetric in (True, False):
        weight = int4_quantize(w, group=64, symmetric=symmetric)

        error = (int4_dequantize(weight) - w).abs().unflatten(1, (-1, 64)).amax(-1)

        # Where the range's ends are rounded with the zero point, an end may be cut by half a step more.
        assert (error <= weight.scale * (0.501 if symmetric else 1.001)).all()


def test_nf4_values_are_the_nearest_of_the_table(device: torch.device) -> None:
    w = torch.randn(4, 128, device=device)
    weight = nf4_quantize(w)
    table = torch.tensor(module.NF4_TABLE, device=device)
    blocks = w.view(-1, 64)
    relative = blocks / blocks.abs().amax(-1, keepdim=True)

    codes = unpack_bits(weight.packed, 4, 128).view(-1, 64)

    assert torch.equal(codes.long(), (relative[..., None] - table).abs().argmin(-1))


def test_nf4_scales_are_quantized_again_in_blocks_of_256(device: torch.device) -> None:
    w = torch.randn(300, 64, device=device) * torch.linspace(0.5, 2, 300, device=device)[:, None]
    weight = nf4_quantize(w)
    true = w.abs().amax(-1)

    assert weight.scale.dtype == torch.int8
    assert weight.level2.shape == (2,)
    assert ((nf4_scales(weight) - true).abs() <= weight.level2.repeat_interleave(256)[:300] * 0.501).all()
    assert torch.equal(nf4_dequantize(weight), nf4_dequantize(weight, impl="reference"))


def test_nf4_table_holds_the_quantiles_of_a_normal_distribution() -> None:
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8))[:-1]
    positive = normal.icdf(torch.linspace(0.5, offset, 9))[1:]
    quantiles = torch.cat([negative, torch.zeros(1), positive]) / positive.max()

    assert torch.allclose(quantiles, torch.tensor(module.NF4_TABLE), atol=1e-5)


def test_binary_scales_are_means(device: torch.device) -> None:
    w = torch.randn(3, 40, device=device)

    assert torch.equal(binary_dequantize(binary_quantize(w, impl="reference")).abs()[:, 0], w.abs().mean(1))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    w, x = torch.randn(4, 96, device=device), torch.randn(2, 96, device=device)
    weight = int4_quantize(w, group=32)
    with pytest.raises(ValueError, match="groups of 48 in rows of 96: take a multiple of 32"):
        int4_quantize(w, group=48)
    with pytest.raises(ValueError, match="K a multiple of 64"):
        nf4_quantize(w)
    with pytest.raises(ValueError, match=r"expected x \[..., 96\]"):
        int4_linear(x[:, :64], weight)
    with pytest.raises(ValueError, match="make it with int4_quantize"):
        int4_linear(x, weight._replace(scale=weight.scale[:2]))
    with pytest.raises(ValueError, match="it has 'reference', 'triton'"):
        int4_linear(x, weight, impl="torch")
    with pytest.raises(ValueError, match="the kernel takes float32, bfloat16, float16"):
        int4_linear(x.double(), weight)
    with pytest.raises(ValueError, match="make them with binary_quantize"):
        binary_linear(x, binary_quantize(w)._replace(features=300))


@pytest.mark.gpu
def test_offsets_have_64_bits() -> None:
    device = torch.device("cuda")
    # Twice 2**31 codes in 2**31 bytes and a little: made without a dense matrix.
    outputs, features = 2**15 + 64, 2**17
    packed = torch.randint(256, (outputs, features // 2), device=device, dtype=torch.uint8)
    scale = torch.full((outputs, features // 128), 0.01, device=device, dtype=torch.float16)
    weight = int4_quantize(torch.zeros(1, 128, device=device), group=128)._replace(packed=packed, scale=scale)
    last = weight._replace(packed=packed[-64:], scale=scale[-64:])
    for tokens in (1, 16):
        x = torch.randn(tokens, features, device=device, dtype=torch.float16)

        got = int4_linear(x, weight)[:, -64:]

        assert torch.allclose(got, int4_linear(x, last, impl="reference"), rtol=1e-2, atol=0.1)
