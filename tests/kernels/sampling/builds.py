"""Sampling with all filters, and with none."""

from __future__ import annotations

from danaus.kernels.sampling._triton import sampling_kernel
from danaus.kernels.sampling.api import _CONFIG

from ..aot import Build

SIGNATURE = {
    "logits_ptr": "*bf16",
    **dict.fromkeys(("out_ptr", "seed_ptr", "position_ptr"), "*i64"),
    **dict.fromkeys(("noise_ptr", "sharpness_ptr", "top_k_ptr", "top_p_ptr", "max_gap_ptr"), "*fp32"),
    "num_rows": "i32",
    **dict.fromkeys(("vocab", "stride"), "i32:16"),
}


def builds() -> list[Build]:
    """A vocabulary longer than a block."""
    tile = {name: value for name, value in _CONFIG.items() if name != "num_warps"}
    return [
        Build(
            name=f"sampling-{'filtered' if filters else 'plain'}",
            kernel=sampling_kernel,
            signature=SIGNATURE,
            constexprs={"HAS_TOP_K": filters, "HAS_TOP_P": filters, **tile},
            num_warps=_CONFIG["num_warps"],
        )
        for filters in (True, False)
    ]
