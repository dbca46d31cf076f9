"""LayerNorm in bf16 with all its parts: usual and the widest rows."""

from __future__ import annotations

from danaus.kernels.layernorm import _layernorm_backward_kernel, _layernorm_kernel
from danaus.kernels.rows import MAX_FEATURES, row_config

from ..aot import Build

FORWARD = {
    **dict.fromkeys(("x_ptr", "residual_ptr", "w_ptr", "b_ptr", "y_ptr", "h_ptr"), "*bf16"),
    **dict.fromkeys(("mean_ptr", "rstd_ptr"), "*fp32"),
    **dict.fromkeys(("x_stride", "residual_stride", "num_cols"), "i32:16"),
    "num_rows": "i32",
    "eps": "fp32",
}
BACKWARD = {
    **dict.fromkeys(("dy_ptr", "dh_ptr", "h_ptr", "w_ptr", "dx_ptr"), "*bf16"),
    **dict.fromkeys(("mean_ptr", "rstd_ptr", "dw_ptr", "db_ptr"), "*fp32"),
    **dict.fromkeys(("dy_stride", "dh_stride", "h_stride", "num_cols"), "i32:16"),
    "num_rows": "i32",
}


def builds() -> list[Build]:
    """Forward and backward for each width."""
    found: list[Build] = []
    for width in (1024, 4096, MAX_FEATURES):
        config = row_config(width)
        num_warps = config.pop("num_warps")
        constexprs = {"HAS_RESIDUAL": True, "HAS_BIAS": True, "BLOCK": width, **config}
        for name, kernel, signature in (
            ("forward", _layernorm_kernel, FORWARD),
            ("backward", _layernorm_backward_kernel, BACKWARD),
        ):
            found.append(
                Build(
                    name=f"layernorm-{name}-{width}",
                    kernel=kernel,
                    signature=signature,
                    constexprs=constexprs,
                    num_warps=num_warps,
                    # 16 and more columns a thread: the running sums of the gradients go to the cache.
                    max_stack=1024 if name == "backward" and width > 8192 else 0,
                )
            )
    return found
