"""LLM.int8 (arXiv 2208.07339): the few columns of x with large values in 16 bit, all the others in int8.

Shapes:  M = tokens (all leading dims together), N = outputs, K = features, O = outlier columns.
Math:    O = {k: max over m of |x[m, k]| >= threshold}. With x' = x without O, rounded to int8 by token (int8.py):
         y = (q_x' q_w.T * scale_x'[m] + x[:, O] q_w[:, O].T) * scale_w[n], rounded once.
         The weight is int8 throughout: an outlier column of it, up to 127, is exact in fp16 and bf16.
         threshold = inf is W8A8, 0 keeps all of x in 16 bit.
Cost:    that of W8A8 and 2 M N |O| on the 16-bit units. The number of outlier columns stays on the GPU: no
         synchronisation, and a graph can be captured. Inference only.
"""

from __future__ import annotations

import torch

from ..launch import Impl, check_device
from .inputs import check_floats, check_linear
from .int8 import (
    Int8Rows,
    check_weight,
    int8_matmul,
    int8_quantize_reference,
    launch_matmul,
    quantize_op,
)

THRESHOLD = 6.0


def llm_int8_linear_reference(x_MK: torch.Tensor, weight: Int8Rows, threshold: float = THRESHOLD) -> torch.Tensor:
    """Define the result; float64 stays wide throughout."""
    return _split(x_MK, weight, threshold, "reference")


def llm_int8_linear(
    x: torch.Tensor, weight: Int8Rows, *, threshold: float = THRESHOLD, impl: Impl = "triton"
) -> torch.Tensor:
    """Multiply activations by an int8 weight, columns with outliers in x's own dtype.

    Args:
        x: ``[..., K]`` fp32, fp16 or bf16; rows may lie apart.
        weight: What :func:`int8_quantize` made of ``[N, K]``.
        threshold: A column with a value as large is an outlier.
        impl: Who computes it; "torch" is ``torch._int_mm`` and a product of the gathered columns, which waits for the
            GPU to count them.

    Returns:
        ``[..., N]`` in x's dtype; no gradient.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; the message says what would.
    """
    check_device("llm_int8_linear", impl, x, *weight)
    check_weight("llm_int8_linear", weight)
    check_linear("llm_int8_linear", x, *weight.values.shape)
    if not threshold >= 0:
        raise ValueError(f"llm_int8_linear: threshold={threshold}, it is a magnitude: 0 or more, inf for none")
    x_MK = x.detach().reshape(-1, x.shape[-1])
    if impl == "triton":
        check_floats("llm_int8_linear", x=x)
        y = outlier_op(x_MK, *weight, float(threshold))
    else:
        y = _split(x_MK, weight, threshold, impl)
    return y.view(*x.shape[:-1], y.shape[-1])


def outlier_columns(x_MK: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return for each column whether it has a value of ``threshold`` or more, bool ``[K]``."""
    if not x_MK.shape[0]:
        return torch.zeros(x_MK.shape[1], dtype=torch.bool, device=x_MK.device)
    return x_MK.abs().amax(0) >= threshold


def _split(x_MK: torch.Tensor, weight: Int8Rows, threshold: float, impl: Impl) -> torch.Tensor:
    values, scale_N = weight
    is_outlier_K = outlier_columns(x_MK, threshold)
    rows = int8_quantize_reference(x_MK.masked_fill(is_outlier_K, 0))
    wide = torch.promote_types(x_MK.dtype, torch.float32)
    inner = int8_matmul(rows.values, values, impl=impl).to(wide) * rows.scale[:, None]
    columns_O = is_outlier_K.nonzero().squeeze(1)
    dtype = wide if impl == "reference" else x_MK.dtype
    outer = x_MK[:, columns_O].to(dtype) @ values[:, columns_O].to(dtype).T
    return ((inner + outer.to(wide)) * scale_N).to(x_MK.dtype)


@torch.library.custom_op("danaus::llm_int8", mutates_args=())
def outlier_op(x: torch.Tensor, values: torch.Tensor, scale_N: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the product in x's dtype."""
    y = _outlier_fake(x, values, scale_N, threshold)
    if not y.numel():
        return y
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    is_outlier_K = outlier_columns(x, threshold).to(torch.int8)
    # Outliers first, in order of k: the kernel takes as many as there are.
    columns = torch.argsort(is_outlier_K, descending=True, stable=True)
    quantized, scale_M = quantize_op(x, is_outlier_K)
    return launch_matmul(
        quantized, values, scale_M, scale_N, y, (x, columns, is_outlier_K.sum(dtype=torch.int32).view(1))
    )


@outlier_op.register_fake
def _outlier_fake(x: torch.Tensor, values: torch.Tensor, scale_N: torch.Tensor, threshold: float) -> torch.Tensor:
    del scale_N, threshold
    return x.new_empty((x.shape[0], values.shape[0]))
