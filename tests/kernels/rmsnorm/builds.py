"""RMSNorm as the decoder launches it: narrow, usual and the widest rows, with and without the residual."""

from __future__ import annotations

from danaus.kernels.rmsnorm import _rmsnorm_backward_kernel, _rmsnorm_kernel
from danaus.kernels.rows import MAX_FEATURES, row_config

from ..aot import Build

FORWARD = {
    **dict.fromkeys(("x_ptr", "residual_ptr", "w_ptr", "y_ptr", "h_ptr"), "*bf16"),
    "rstd_ptr": "*fp32",
    **dict.fromkeys(("x_stride", "residual_stride", "num_cols"), "i32:16"),
    "num_rows": "i32",
    "eps": "fp32",
}
BACKWARD = {
    **dict.fromkeys(("dy_ptr", "dh_ptr", "h_ptr", "w_ptr", "dx_ptr"), "*bf16"),
    **dict.fromkeys(("rstd_ptr", "dw_ptr"), "*fp32"),
    **dict.fromkeys(("dy_stride", "dh_stride", "h_stride", "num_cols"), "i32:16"),
    "num_rows": "i32",
}


def builds() -> list[Build]:
    """Forward and backward for each width."""
    found: list[Build] = []
    for width in (128, 4096, 16384, MAX_FEATURES):
        config = row_config(width)
        num_warps = config.pop("num_warps")
        constexprs = {"HAS_RESIDUAL": True, "BLOCK": width, **config}
        for name, kernel, signature in (
            ("forward", _rmsnorm_kernel, FORWARD),
            ("backward", _rmsnorm_backward_kernel, BACKWARD),
        ):
            found.append(
                Build(
                    name=f"rmsnorm-{name}-{width}",
                    kernel=kernel,
                    signature=signature,
                    constexprs=constexprs,
                    num_warps=num_warps,
                    # 16 and more columns a thread: the running sums of the weight's gradient go to the cache.
                    max_stack=640 if name == "backward" and width > 8192 else 0,
                )
            )
    return found
