"""Quantized products: one token against bf16's dense product, many against ``torch._int_mm``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..quantized import (
    binary_dequantize,
    binary_linear,
    binary_quantize,
    int4_dequantize,
    int4_linear,
    int4_quantize,
    int8_linear,
    int8_matmul,
    int8_quantize,
    llm_int8_linear,
    nf4_dequantize,
    nf4_linear,
    nf4_quantize,
    ternary_dequantize,
    ternary_linear,
    ternary_quantize,
    xnor_linear,
)
from .case import Case, Prepare, Tune

if TYPE_CHECKING:
    from collections.abc import Callable

# The widest matrix of a Llama of 70 billion parameters: gate and up projection.
OUTPUTS, FEATURES = 28672, 8192

GEMV = [
    {"ROWS": rows, "TILE_BYTES": tile, "SPLIT": split, "num_warps": warps}
    for rows, tile, split, warps in ((8, 256, 1, 2), (32, 256, 1, 4), (16, 512, 1, 4), (16, 256, 2, 4), (32, 128, 1, 4))
]
TERNARY_GEMV = [
    {"ROWS": rows, "WORDS": words, "SPLIT": split, "num_warps": warps}
    for rows, words, split, warps in ((8, 64, 1, 2), (32, 64, 1, 4), (16, 128, 1, 4), (16, 128, 1, 8), (16, 64, 2, 4))
]
GEMM = [
    {"ROWS": rows, "TILE_BYTES": 64, "SPLIT": split, "num_warps": 4, "num_stages": stages}
    for rows, split, stages in ((32, 1, 4), (64, 1, 1), (64, 1, 4), (64, 2, 3), (128, 1, 3))
]
INT8 = [
    {"TOKENS": tokens, "ROWS": rows, "BLOCK": block, "num_warps": warps, "num_stages": stages}
    for tokens, rows, block, warps, stages in ((128, 256, 128, 8, 4), (256, 128, 128, 8, 3), (128, 128, 128, 4, 4))
]


def cases() -> list[Case]:
    """Return the cases, those with a goal first."""
    return [*_int8(), *_one_token(), *_few_tokens(), _outliers()]


def _int8() -> list[Case]:
    tokens, outputs, features = 8192, 8192, 8192
    shape = f"M {tokens}, N {outputs}, K {features}"
    tune = Tune(op="int8_matmul", key="M4096", candidates=INT8)
    work = 2.0 * tokens * outputs * features

    def product(x: torch.Tensor, w: torch.Tensor, impl: Any) -> Callable[[], object]:
        rows, weight = (int8_quantize(matrix, impl="reference").values for matrix in (x, w))
        return lambda: int8_matmul(rows, weight, impl=impl)

    return [
        Case(
            name="int8",
            shape=f"{shape}, bf16 activations rounded on the way",
            make=_maker(tokens, outputs, features),
            variants=_linears(lambda w: int8_quantize(w, impl="reference"), int8_linear, torch_too=True),
            unit="TOP/s",
            work=work,
            good=900,
            top=1300,
            tune=tune,
        ),
        Case(
            name="int8-product",
            shape=f"{shape}, int32 out",
            make=_maker(tokens, outputs, features),
            variants={impl: _with(product, impl=impl) for impl in ("reference", "triton", "torch")},
            unit="TOP/s",
            work=work,
        ),
    ]


def _one_token() -> list[Case]:
    key = f"N{OUTPUTS},K{FEATURES}"

    def case(name: str, note: str, bits: float, variants: dict[str, Prepare], **options: Any) -> Case:
        return Case(
            name=name,
            shape=f"M 1, N {OUTPUTS}, K {FEATURES}, {note}",
            make=_maker(1, OUTPUTS, FEATURES),
            variants=variants,
            unit="x",
            work=OUTPUTS * FEATURES * bits / 8,
            **options,
        )

    return [
        case(
            "int4",
            "groups of 128",
            4.125,
            _linears(int4_quantize, int4_linear, int4_dequantize),
            good=2.8,
            top=3.5,
            tune=Tune(op="int4_gemv", key=key, candidates=GEMV),
        ),
        case(
            "int4",
            "groups of 128, zero points",
            4.1875,
            _linears(lambda w: int4_quantize(w, symmetric=False), int4_linear, int4_dequantize),
        ),
        case(
            "nf4",
            "scales in int8",
            4.127,
            _linears(nf4_quantize, nf4_linear, nf4_dequantize),
            good=2.2,
            top=3.2,
            tune=Tune(op="nf4_gemv", key=key, candidates=GEMV),
        ),
        # The dense product has fp activations, so the results differ by their rounding to int8.
        case(
            "ternary",
            "bf16 activations rounded on the way",
            2,
            _linears(ternary_quantize, ternary_linear, ternary_dequantize),
            good=3.5,
            top=6,
            tune=Tune(op="ternary_gemv", key=key, candidates=TERNARY_GEMV),
        ),
        case(
            "binary",
            "BWN",
            1,
            _linears(_binary_weight, binary_linear, binary_dequantize),
            tune=Tune(op="binary_gemv", key=key, candidates=GEMV),
        ),
        case("binary-xnor", "signs of bf16 activations", 1, _xnor()),
    ]


def _few_tokens() -> list[Case]:
    tokens = 16

    def case(name: str, bits: float, variants: dict[str, Prepare]) -> Case:
        return Case(
            name=name,
            shape=f"M {tokens}, N {OUTPUTS}, K {FEATURES}",
            make=_maker(tokens, OUTPUTS, FEATURES),
            variants=variants,
            unit="x",
            work=OUTPUTS * FEATURES * bits / 8,
            tune=Tune(op=f"{name}_gemm", key=f"M{tokens}", candidates=GEMM) if name != "ternary" else None,
        )

    return [
        case("int4", 4.125, _linears(int4_quantize, int4_linear, int4_dequantize)),
        case("nf4", 4.127, _linears(nf4_quantize, nf4_linear, nf4_dequantize)),
        case("ternary", 2, _linears(ternary_quantize, ternary_linear, ternary_dequantize)),
        case("binary", 1, _linears(_binary_weight, binary_linear, binary_dequantize)),
    ]


def _outliers() -> Case:
    tokens, outputs, features = 8192, 8192, 8192
    plain = _maker(tokens, outputs, features)

    def make(device: torch.device, small: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = plain(device, small)
        x[:, :: features // 32 if not small else 64] *= 20
        return x, w

    return Case(
        name="llm-int8",
        shape=f"M {tokens}, N {outputs}, K {features}, 32 outlier columns",
        make=make,
        variants=_linears(lambda w: int8_quantize(w, impl="reference"), llm_int8_linear, torch_too=True),
        unit="TOP/s",
        work=2.0 * tokens * outputs * features,
    )


def _maker(
    tokens: int, outputs: int, features: int
) -> Callable[[torch.device, bool], tuple[torch.Tensor, torch.Tensor]]:
    """Normal activations ``[M, K]`` and weights ``[N, K]``."""

    def make(device: torch.device, small: bool) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        m, n, k = (min(tokens, 24), 48, 256) if small else (tokens, outputs, features)
        # The interpreter gets bf16 wrong.
        dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
        x, w = (torch.randn((r, k), generator=generator, device=device, dtype=dtype) for r in (m, n))
        return x, w

    return make


def _linears(
    quantize: Callable[..., Any],
    linear: Callable[..., object],
    dequantize: Callable[..., torch.Tensor] | None = None,
    *,
    torch_too: bool = False,
) -> dict[str, Prepare]:
    """``linear`` with the weight packed before; beside it torch's own, or the dense product of the same weight."""

    def packed(x: torch.Tensor, w: torch.Tensor, impl: Any) -> Callable[[], object]:
        weight = quantize(w)
        return lambda: linear(x, weight, impl=impl)

    def dense(x: torch.Tensor, w: torch.Tensor) -> Callable[[], object]:
        assert dequantize is not None
        matrix = dequantize(quantize(w), x.dtype)
        return lambda: x @ matrix.T

    impls = ("reference", "triton", "torch") if torch_too else ("reference", "triton")
    variants: dict[str, Prepare] = {impl: _with(packed, impl=impl) for impl in impls}
    return variants if dequantize is None else {**variants, "torch": dense}


def _xnor() -> dict[str, Prepare]:
    """Beside it the dense product of signs and scales: what XNOR stands for."""

    def dense(x: torch.Tensor, w: torch.Tensor) -> Callable[[], object]:
        rows, matrix = (binary_dequantize(_binary_weight(part), x.dtype, impl="reference") for part in (x, w))
        return lambda: rows @ matrix.T

    return {**_linears(_binary_weight, xnor_linear), "torch": dense}


def _with(prepare: Callable[..., Callable[[], object]], **options: object) -> Prepare:
    return lambda *inputs: prepare(*inputs, **options)


def _binary_weight(w: torch.Tensor) -> Any:
    return binary_quantize(w, impl="reference")
