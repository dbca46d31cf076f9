"""Gated activations in bf16, every activation."""

from __future__ import annotations

from danaus.kernels.activations import _CONFIG, _gated_backward_kernel, _gated_kernel

from ..aot import Build

FORWARD = {
    **dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(("gate_stride", "up_stride", "num_cols"), "i32:16"),
    "blocks_per_row": "i32",
}
BACKWARD = {
    **dict.fromkeys(("dout_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr"), "*bf16"),
    **dict.fromkeys(("dout_stride", "gate_stride", "up_stride", "num_cols"), "i32:16"),
    "blocks_per_row": "i32",
}


def builds() -> list[Build]:
    """Forward and backward of each activation."""
    return [
        Build(
            name=f"activations-{name}-{act}",
            kernel=kernel,
            signature=signature,
            constexprs={"ACT": number, "BLOCK": _CONFIG["BLOCK"]},
            num_warps=_CONFIG["num_warps"],
        )
        for number, act in enumerate(("silu", "gelu", "gelu-tanh"))
        for name, kernel, signature in (
            ("forward", _gated_kernel, FORWARD),
            ("backward", _gated_backward_kernel, BACKWARD),
        )
    ]
