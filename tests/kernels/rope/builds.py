"""Rotary positions in bf16, for the usual head widths."""

from __future__ import annotations

from danaus.kernels.rope import _rope_kernel, rope_config

from ..aot import Build

SIGNATURE = {
    **dict.fromkeys(("x_ptr", "y_ptr"), "*bf16"),
    **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
    "positions_ptr": "*i64",
    **dict.fromkeys(("x_stride_b", "x_stride_h", "x_stride_t", "y_stride_b", "y_stride_h", "y_stride_t"), "i32:16"),
    **dict.fromkeys(("positions_stride", "num_heads", "num_tokens", "head_blocks", "token_blocks"), "i32"),
    **dict.fromkeys(("cos_stride", "sin_stride", "half"), "i32:16"),
}


def builds() -> list[Build]:
    """With positions, there and back."""
    found: list[Build] = []
    for width, heads, backward in ((64, 8, False), (128, 32, False), (128, 32, True), (256, 16, False)):
        config = rope_config(heads, width)
        num_warps = config.pop("num_warps")
        found.append(
            Build(
                name=f"rope-{'backward' if backward else 'forward'}-{width}",
                kernel=_rope_kernel,
                signature=SIGNATURE,
                constexprs={"HAS_POSITIONS": True, "BACKWARD": backward, "HALF": width // 2, **config},
                num_warps=num_warps,
            )
        )
    return found
