"""W8A8 and LLM.int8: whole numbers are exact, outlier columns stay in 16 bit."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
import torch

from danaus.kernels.quantized import int8 as module
from danaus.kernels.quantized import (
    int8_dequantize,
    int8_linear,
    int8_matmul,
    int8_quantize,
    llm_int8_linear,
    outliers,
)
from danaus.kernels.tuning import using

from ..agree import DTYPES, assert_agrees
from ..truth import Canaries, misaligned, odd_shapes, poisoned_outputs, strided


def weights(outputs: int, features: int, device: torch.device) -> module.Int8Rows:
    return int8_quantize(torch.randn(outputs, features, device=device), impl="reference")


def integers(rows: int, features: int, device: torch.device) -> torch.Tensor:
    return torch.randint(-128, 128, (rows, features), device=device, dtype=torch.int8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*odd_shapes(), (2, 5000)])
def test_rows_are_rounded_to_the_references_bits(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    x = (torch.randn(shape, device=device) * 10 ** torch.linspace(-3, 3, shape[0], device=device)[:, None]).to(dtype)

    with poisoned_outputs():
        got = int8_quantize(x)
    expected = int8_quantize(x, impl="reference")

    assert torch.equal(got.values, expected.values)
    assert torch.equal(got.scale, expected.scale)


def test_halves_are_rounded_to_even_and_zeros_stay(device: torch.device) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5], [0.0] * 7], device=device)
    x[1, 1:] = -0.0

    got = int8_quantize(x)

    assert got.values.tolist() == [[127, 0, 2, 2, 0, -2, -126], [0] * 7]
    assert int8_dequantize(got)[1].count_nonzero() == 0


def test_the_largest_error_is_half_a_step(device: torch.device) -> None:
    x = torch.randn(9, 64, device=device)

    rows = int8_quantize(x)

    assert ((int8_dequantize(rows) - x).abs() <= 0.5001 * rows.scale[:, None]).all()


@pytest.mark.parametrize(("tokens", "outputs", "features"), [(1, 1, 1), (3, 5, 17), (17, 70, 130), (33, 9, 256)])
def test_products_are_exact(tokens: int, outputs: int, features: int, device: torch.device) -> None:
    x, w = integers(tokens, features, device), integers(outputs, features, device)

    with poisoned_outputs():
        got = int8_matmul(x, w)

    assert got.dtype == torch.int32
    assert torch.equal(got, int8_matmul(x, w, impl="reference"))
    assert torch.equal(got.cpu(), (x.cpu().long() @ w.cpu().long().T).int())


def test_torchs_own_product_is_the_same(device: torch.device) -> None:
    x, w = integers(3, 64, device), integers(16, 64, device)

    assert torch.equal(int8_matmul(x, w, impl="torch"), int8_matmul(x, w, impl="reference"))


def test_tiles_in_groups_cover_the_output(device: torch.device) -> None:
    x, w = integers(80, 20, device), integers(70, 20, device)

    with using("int8_matmul", {"TOKENS": 16, "ROWS": 16, "BLOCK": 32, "GROUP": 2}), poisoned_outputs():
        got = int8_matmul(x, w)

    assert torch.equal(got, int8_matmul(x, w, impl="reference"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_is_the_references_bits(dtype: torch.dtype, device: torch.device) -> None:
    for tokens, outputs, features in ((1, 9, 40), (18, 33, 100)):
        x, weight = torch.randn(tokens, features, device=device, dtype=dtype), weights(outputs, features, device)

        with poisoned_outputs():
            got = int8_linear(x, weight)

        assert got.dtype == dtype
        assert torch.equal(got, int8_linear(x, weight, impl="reference"))


def test_it_is_close_to_the_dense_product(device: torch.device) -> None:
    x, w = torch.randn(16, 256, device=device), torch.randn(32, 256, device=device)
    dense = x @ w.T

    for impl in ("triton", "torch"):
        got = int8_linear(x, int8_quantize(w, impl="reference"), impl=impl)

        assert (got - dense).norm() / dense.norm() < 0.015


@pytest.mark.parametrize("layout", [strided, misaligned, lambda x: x.t().clone().t()])
def test_any_layout_of_the_rows_will_do(layout: Any, device: torch.device) -> None:
    x, weight = torch.randn(5, 37, device=device), weights(6, 37, device)
    x[:, 3] *= 9

    assert torch.equal(int8_linear(layout(x), weight), int8_linear(x, weight))
    assert torch.equal(llm_int8_linear(layout(x), weight), llm_int8_linear(x, weight))
    assert torch.equal(int8_matmul(layout(weight.values), weight.values), int8_matmul(weight.values, weight.values))


def test_leading_dims_are_kept_and_nothing_is_nothing(device: torch.device) -> None:
    weight, none = weights(4, 20, device), weights(0, 20, device)
    for linear in (int8_linear, llm_int8_linear):
        for impl in ("triton", "reference"):
            assert linear(torch.randn(2, 3, 20, device=device), weight, impl=impl).shape == (2, 3, 4)
            assert linear(torch.randn(20, device=device), weight, impl=impl).shape == (4,)
            assert linear(torch.randn(0, 20, device=device), weight, impl=impl).shape == (0, 4)
            assert linear(torch.randn(2, 20, device=device), none, impl=impl).shape == (2, 0)


def test_nothing_around_the_buffers_is_read_or_written(device: torch.device) -> None:
    canaries = Canaries()
    weight, x = weights(5, 33, device), torch.randn(3, 33, device=device)
    x[:, ::5] *= 9
    guarded = module.Int8Rows(canaries.around(weight.values), canaries.around(weight.scale))

    for linear in (int8_linear, llm_int8_linear):
        assert torch.equal(linear(canaries.around(x), guarded), linear(x, weight))
    canaries.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [0, 1, 5, 37])
def test_outlier_columns_are_not_rounded(columns: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = torch.randn(7, 90, device=device, dtype=dtype).clamp(-5, 5), weights(21, 90, device)
    x[3, torch.randperm(90, device=device)[:columns]] = 30

    assert_agrees(lambda x: llm_int8_linear(x, weight), lambda x: outliers.llm_int8_linear_reference(x, weight), (x,))
    assert torch.equal(outliers.outlier_columns(x, 6.0).sum().cpu(), torch.tensor(columns))


def test_bf16_is_not_garbage_in_the_interpreter(device: torch.device) -> None:
    x, weight = torch.randn(3, 90, device=device, dtype=torch.bfloat16), weights(21, 90, device)
    x[:, ::9] *= 20
    expected = llm_int8_linear(x.float(), weight, impl="reference")

    assert (llm_int8_linear(x, weight) - expected).norm() < 0.02 * expected.norm()


def test_outliers_cost_int8_its_precision_and_this_not(device: torch.device) -> None:
    x, w = torch.randn(16, 256, device=device), torch.randn(32, 256, device=device)
    x[:, ::64] *= 40
    weight, dense = int8_quantize(w), x @ w.T

    plain, split = ((linear(x, weight) - dense).norm() / dense.norm() for linear in (int8_linear, llm_int8_linear))

    assert split < 0.6 * plain


def test_the_threshold_goes_from_all_in_16_bit_to_none(device: torch.device) -> None:
    x, weight = torch.randn(4, 50, device=device), weights(6, 50, device)

    assert torch.equal(llm_int8_linear(x, weight, threshold=inf), int8_linear(x, weight))
    assert torch.allclose(llm_int8_linear(x, weight, threshold=0), x @ int8_dequantize(weight).T, atol=1e-4)
    assert torch.allclose(
        llm_int8_linear(x, weight, threshold=2, impl="torch"), llm_int8_linear(x, weight, threshold=2), atol=1e-4
    )


def test_the_operators_are_registered_whole(device: torch.device) -> None:
    x, (values, scale) = torch.randn(3, 20, device=device), weights(4, 20, device)

    torch.library.opcheck(module.quantize_op, (x, None))
    torch.library.opcheck(module.matmul_op, (values, values, scale, scale, torch.float16))
    torch.library.opcheck(outliers.outlier_op, (x, values, scale, 2.0))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x, weight = torch.randn(3, 20, device=device), weights(4, 20, device)
    with pytest.raises(ValueError, match=r"expected x \[..., 20\]"):
        int8_linear(x[:, :7], weight)
    with pytest.raises(ValueError, match="make them with int8_quantize"):
        int8_linear(x, weight._replace(values=weight.values.float()))
    with pytest.raises(ValueError, match=r"expected int8 \[M, K\]"):
        int8_matmul(x, weight.values)
    with pytest.raises(ValueError, match="threshold=-1"):
        llm_int8_linear(x, weight, threshold=-1)
    with pytest.raises(ValueError, match="it has 'reference', 'triton'"):
        int8_quantize(x, impl="torch")
    wide = torch.empty(1, module.MAX_FEATURES + 1, dtype=torch.int8, device=device)
    with pytest.raises(ValueError, match="split K and add"):
        int8_matmul(wide, wide)


@pytest.mark.gpu
def test_offsets_have_64_bits() -> None:
    device = torch.device("cuda")
    x, w = integers(2**16 + 300, 64, device), integers(2**15 + 64, 64, device)

    got = int8_matmul(x, w)[-200:]

    assert torch.equal(got, int8_matmul(x[-200:], w, impl="reference"))
