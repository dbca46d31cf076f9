"""The losses in bf16 with every option on, and the fused one in fp32 too."""

from __future__ import annotations

import torch

from danaus.kernels.cross_entropy import _triton as kernels
from danaus.kernels.cross_entropy.linear import MAX_SHARES, tile_config
from danaus.kernels.cross_entropy.plain import _CONFIG

from ..aot import Build

OPTIONS = {"ignore_index": "i32", "smoothing": "fp32", "z_loss": "fp32"}
LSE = {
    "targets_ptr": "*i64",
    **dict.fromkeys(("max_ptr", "sum_ptr", "z_target_ptr", "z_sum_ptr"), "*fp32"),
    "num_rows": "i32",
    **dict.fromkeys(("vocab", "num_features", "x_stride", "w_stride", "share"), "i32:16"),
    "num_shares": "i32",
    "softcap": "fp32",
}
GRADIENT = {
    "targets_ptr": "*i64",
    **dict.fromkeys(("lse_ptr", "dloss_ptr"), "*fp32"),
    **dict.fromkeys(("num_rows", "dloss_stride"), "i32"),
    **dict.fromkeys(("vocab", "num_features", "x_stride", "w_stride", "first_col", "end"), "i32:16"),
    **OPTIONS,
    "softcap": "fp32",
}
JOIN = {
    **dict.fromkeys(("max_ptr", "sum_ptr", "z_target_ptr", "z_sum_ptr", "loss_ptr", "lse_ptr"), "*fp32"),
    "targets_ptr": "*i64",
    **dict.fromkeys(("num_rows", "vocab", "num_shares"), "i32"),
    **OPTIONS,
}
PLAIN = {
    "logits_ptr": "*bf16",
    "targets_ptr": "*i64",
    "lse_ptr": "*fp32",
    **dict.fromkeys(("vocab", "stride"), "i32:16"),
    **OPTIONS,
    "softcap": "fp32",
}


def builds() -> list[Build]:
    """Both passes of the fused loss, the join between them, both passes of the plain one."""
    found: list[Build] = []
    for dtype, kind, softcap in (
        (torch.bfloat16, "*bf16", False),
        (torch.bfloat16, "*bf16", True),
        (torch.float32, "*fp32", True),
    ):
        config = tile_config(dtype, softcap=softcap)
        num_warps, num_stages = config.pop("num_warps"), config.pop("num_stages")
        tile = {**config, "EVEN_D": True, "PRECISION": "ieee", "HAS_SOFTCAP": softcap}
        for name, kernel, types, constexprs in (
            ("lse", kernels.linear_lse_kernel, LSE, {**tile, "HAS_SMOOTHING": softcap}),
            ("gradient", kernels.linear_gradient_kernel, {**GRADIENT, "out_ptr": kind}, tile),
        ):
            found.append(
                Build(
                    name=f"linear-cross-entropy-{name}-{kind[1:]}{'-softcap' if softcap else ''}",
                    kernel=kernel,
                    signature={"x_ptr": kind, "w_ptr": kind, **types},
                    constexprs=constexprs,
                    num_warps=num_warps,
                    num_stages=num_stages,
                    wgmma=dtype is torch.bfloat16,
                )
            )
    plain = {"HAS_SOFTCAP": True, "BLOCK_V": _CONFIG["BLOCK_V"]}
    return [
        *found,
        Build(
            name="linear-cross-entropy-join",
            kernel=kernels.lse_join_kernel,
            signature=JOIN,
            constexprs={"HAS_SMOOTHING": True, "BLOCK_N": 32, "SHARES": MAX_SHARES},
        ),
        Build(
            name="cross-entropy-forward",
            kernel=kernels.loss_kernel,
            signature={**PLAIN, "loss_ptr": "*fp32"},
            constexprs=plain,
            num_warps=_CONFIG["num_warps"],
        ),
        Build(
            name="cross-entropy-backward",
            kernel=kernels.gradient_kernel,
            signature={
                **PLAIN,
                "dloss_ptr": "*fp32",
                "dloss_stride": "i32",
                "blocks_per_row": "i32",
                "out_ptr": "*bf16",
            },
            constexprs=plain,
            num_warps=_CONFIG["num_warps"],
        ),
    ]
