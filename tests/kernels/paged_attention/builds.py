"""The paged kernels as an H200 gets them: decode and mixed batches, caches of 16 and 8 bits, and the merge."""

from __future__ import annotations

import torch

from danaus.kernels.launch import next_power_of_2
from danaus.kernels.paged_attention import _triton, api

from ..aot import Build

CACHES = {"bf16": torch.bfloat16, "i8": torch.int8, "fp8e4nv": torch.float8_e4m3fn}
STRIDES = {"q": "thd", "k": "pshd", "v": "pshd", "k_scale": "psh", "v_scale": "psh", "out": "thd"}


def builds() -> list[Build]:
    decode = [paged(width, "bf16", decode=True) for width in (64, 128, 256)]
    quantized = [paged(128, cache, decode=True) for cache in ("i8", "fp8e4nv")]
    mixed = [
        paged(width, cache, decode=False) for width, cache in ((64, "bf16"), (128, "bf16"), (256, "bf16"), (128, "i8"))
    ]
    everything = paged(128, "bf16", decode=False, everything=True)
    return [*decode, *quantized, *mixed, everything, merge(128), merge(256)]


def paged(width: int, cache: str, *, decode: bool, everything: bool = False) -> Build:
    signature = {
        "q_ptr": "*bf16", "k_ptr": f"*{cache}", "v_ptr": f"*{cache}", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32",
        "table_ptr": "*i32", "lens_ptr": "*i32", "starts_ptr": "*i32", "out_ptr": "*bf16", "part_ptr": "*fp32",
        "part_lse_ptr": "*fp32", "table_stride": "i32:16", "num_sequences": "i32", "left": "i32",
        "scale": "fp32", "softcap": "fp32",
    }  # fmt: skip
    constexprs: dict[str, object] = {}
    for tensor, dims in STRIDES.items():
        signature.update({f"{tensor}_stride_{dim}": "i32:16" for dim in dims})
    # Triton makes constants of strides that are 1, and of pointers that are None.
    for tensor in ("q", "k", "v", "out"):
        del signature[f"{tensor}_stride_d"]
        constexprs[f"{tensor}_stride_d"] = 1
    quantized = cache != "bf16"
    unused = [name for name in signature if "scale_" in name and not quantized]
    if decode:
        unused.append("starts_ptr")
    for name in unused:
        del signature[name]
        constexprs[name] = None
    config = api._default(torch.empty(0, width, dtype=CACHES[cache]), decode=decode)
    del config["PROGRAMS_PER_SM"]
    constexprs |= common(width, config["BLOCK_M"], decode=decode, everything=everything)
    constexprs |= {"BLOCK_M": config.pop("BLOCK_M"), "BLOCK_N": config.pop("BLOCK_N"), "PAGE": 16}
    constexprs |= {"HAS_SOFTCAP": everything, "HAS_SCALES": quantized, "PRECISION": api.PRECISION}
    what = f"{'decode' if decode else 'mixed'} d{width} {cache}{' window, softcap' if everything else ''}"
    return Build(
        name=f"paged attention {what}",
        kernel=_triton._paged_kernel,
        signature=signature,
        constexprs=constexprs,
        # A tile of 16 rows is too low for Hopper's own instructions, which memory does not wait for.
        wgmma=not decode,
        **config,
    )


def merge(width: int) -> Build:
    strides = {"out_stride_t": "i32:16", "out_stride_h": "i32:16"}
    return Build(
        name=f"paged attention merge d{width}",
        kernel=_triton._merge_kernel,
        signature={
            "part_ptr": "*fp32", "part_lse_ptr": "*fp32", "lens_ptr": "*i32", "out_ptr": "*bf16", "left": "i32",
            **strides,
        },
        constexprs={
            "starts_ptr": None, "out_stride_d": 1, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_S": next_power_of_2(128),
            **common(width, 16, decode=True, everything=False), "NUM_SPLITS": 128,
        },
        num_warps=api.MERGE_WARPS,
    )  # fmt: skip


def common(width: int, block_m: int, *, decode: bool, everything: bool) -> dict[str, object]:
    return {
        "GROUP": 4,
        "WIDTH": width,
        "BLOCK_D": width,
        "BLOCK_Q": 1 if decode else block_m // 4,
        "NUM_SPLITS": 5,
        "DECODE": decode,
        "HAS_LEFT": everything,
    }
