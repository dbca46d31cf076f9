"""The quantized products as production launches them on an H200: one token, few and many."""

from __future__ import annotations

from danaus.kernels.quantized._binary import _sign_kernel, _xnor_kernel
from danaus.kernels.quantized._int8 import _int8_kernel, _quantize_kernel
from danaus.kernels.quantized._ternary import _ternary_gemm_kernel, _ternary_gemv_kernel
from danaus.kernels.quantized._weight_only import _dequantize_kernel, _gemm_kernel, _gemv_kernel
from danaus.kernels.quantized.binary import xnor_config
from danaus.kernels.quantized.int8 import matmul_config
from danaus.kernels.quantized.ternary import gemm_config as ternary_gemm_config
from danaus.kernels.quantized.weight_only import BITS, gemm_config, tile_shape

from ..aot import Build

# Bytes under one scale: groups of 128 and of 64 weights; rows of 8192.
SCALED_BYTES = {"int4": 64, "int4-32": 16, "nf4": 32, "binary": 1024}

SCALES = {
    "int4": {"scale_ptr": "*fp16", "zero_ptr": "*u8"},
    "nf4": {"scale_ptr": "*i8", "level2_ptr": "*fp32", "offset_ptr": "*fp32", "table_ptr": "*fp32"},
    "binary": {"scale_ptr": "*fp32"},
}
POINTERS = ("scale_ptr", "zero_ptr", "level2_ptr", "offset_ptr", "table_ptr")
SIZES = {**dict.fromkeys(("num_outputs", "num_features", "num_groups", "num_scales"), "i32:16"), "per_scale": "i32"}


def builds() -> list[Build]:
    """Every kernel of the folder."""
    return [*weight_only(), *int8(), *ternary(), *binary()]


def weight_only() -> list[Build]:
    import torch

    found: list[Build] = []
    for name, scaled in SCALED_BYTES.items():
        scheme = name.partition("-")[0]
        pointers = {"packed_ptr": "*u8", **SCALES[scheme]}
        absent = dict.fromkeys(set(POINTERS) - set(pointers))
        signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", **pointers, **SIZES}
        shared = {"SCHEME": scheme, "BITS": BITS[scheme], "HAS_ZERO": scheme == "int4", **absent}
        found.extend(
            Build(
                name=f"quantized-gemv-{name}-split{split}",
                kernel=_gemv_kernel,
                signature={**signature, "y_ptr": "*bf16" if split == 1 else "*fp32"},
                constexprs={**shared, **tile_shape(256, scaled), "ROWS": 16, "SPLIT": split},
            )
            for split in (1, 4)
        )
        for tokens in (16, 64, 128):
            config = gemm_config(scheme, tokens, 8192, torch.device("cpu"))
            warps, stages = config.pop("num_warps"), config.pop("num_stages")
            tile = tile_shape(config.pop("TILE_BYTES"), scaled)
            found.append(
                Build(
                    name=f"quantized-gemm-{name}-{tokens}",
                    kernel=_gemm_kernel,
                    signature={**signature, "x_stride": "i32:16", "num_tokens": "i32"},
                    constexprs={**shared, **tile, **config, "WIDE": False},
                    num_warps=warps,
                    num_stages=stages,
                    wgmma=tokens >= 64,
                )
            )
        signature = {"w_ptr": "*bf16", **pointers, **SIZES}
        found.append(
            Build(
                name=f"quantized-dequantize-{name}",
                kernel=_dequantize_kernel,
                signature=signature,
                constexprs={**shared, **tile_shape(128, scaled), "ROWS": 16},
            )
        )
    return found


def int8() -> list[Build]:
    found = [
        Build(
            name=f"quantized-int8-rows{'-outliers' * has_outliers}",
            kernel=_quantize_kernel,
            signature={
                "x_ptr": "*bf16",
                "values_ptr": "*i8",
                "scale_ptr": "*fp32",
                "x_stride": "i32:16",
                "num_features": "i32:16",
                **({"outlier_ptr": "*i8"} if has_outliers else {}),
            },
            constexprs={
                "HAS_OUTLIERS": has_outliers,
                "BLOCK": 4096,
                **({} if has_outliers else {"outlier_ptr": None}),
            },
            num_warps=8,
        )
        for has_outliers in (False, True)
    ]
    outliers = {"wide_ptr": "*bf16", "column_ptr": "*i64", "count_ptr": "*i32"}
    for tokens in (16, 128):
        for has_outliers in (False, True):
            config = matmul_config(tokens, has_outliers=has_outliers)
            warps, stages = config.pop("num_warps"), config.pop("num_stages")
            found.append(
                Build(
                    name=f"quantized-int8-matmul-{tokens}{'-outliers' * has_outliers}",
                    kernel=_int8_kernel,
                    signature={
                        **dict.fromkeys(("x_ptr", "w_ptr"), "*i8"),
                        **dict.fromkeys(("x_scale_ptr", "w_scale_ptr"), "*fp32"),
                        **(outliers if has_outliers else {}),
                        "y_ptr": "*bf16",
                        **dict.fromkeys(("wide_stride", "num_outputs", "num_features"), "i32:16"),
                        "num_tokens": "i32",
                    },
                    constexprs={
                        "IS_SCALED": True,
                        "WIDE": False,
                        "HAS_OUTLIERS": has_outliers,
                        **({} if has_outliers else dict.fromkeys(outliers)),
                        **config,
                    },
                    num_warps=warps,
                    num_stages=stages,
                    wgmma=tokens == 128,
                )
            )
    return found


def ternary() -> list[Build]:
    scales = dict.fromkeys(("x_scale_ptr", "w_scale_ptr"), "*fp32")
    found = [
        Build(
            name="quantized-ternary-gemv",
            kernel=_ternary_gemv_kernel,
            signature={
                **dict.fromkeys(("x_ptr", "packed_ptr"), "*i32"),
                **scales,
                "y_ptr": "*bf16",
                **dict.fromkeys(("num_outputs", "num_words"), "i32:16"),
            },
            constexprs={"IS_SCALED": True, "INTERP": False, "WORDS": 64, "ROWS": 16, "SPLIT": 1},
        )
    ]
    for tokens in (16, 128):
        config = ternary_gemm_config(tokens)
        warps, stages = config.pop("num_warps"), config.pop("num_stages")
        found.append(
            Build(
                name=f"quantized-ternary-gemm-{tokens}",
                kernel=_ternary_gemm_kernel,
                signature={
                    "x_ptr": "*i8",
                    "packed_ptr": "*u8",
                    **scales,
                    "y_ptr": "*bf16",
                    **dict.fromkeys(("num_outputs", "num_features", "row_bytes"), "i32:16"),
                    "num_tokens": "i32",
                },
                constexprs={"IS_SCALED": True, **config},
                num_warps=warps,
                num_stages=stages,
                wgmma=tokens == 128,
            )
        )
    return found


def binary() -> list[Build]:
    config = xnor_config()
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    return [
        Build(
            name="quantized-sign",
            kernel=_sign_kernel,
            signature={
                "x_ptr": "*bf16",
                "packed_ptr": "*u8",
                "scale_ptr": "*fp32",
                **dict.fromkeys(("x_stride", "num_features", "row_bytes"), "i32:16"),
            },
            constexprs={"BYTES": 512},
        ),
        Build(
            name="quantized-xnor",
            kernel=_xnor_kernel,
            signature={
                **dict.fromkeys(("x_ptr", "w_ptr"), "*i32"),
                **dict.fromkeys(("x_scale_ptr", "w_scale_ptr"), "*fp32"),
                "y_ptr": "*bf16",
                **dict.fromkeys(("num_outputs", "num_features", "num_words"), "i32:16"),
                "num_tokens": "i32",
            },
            constexprs={"IS_SCALED": True, **config},
            num_warps=warps,
            num_stages=stages,
        ),
    ]
