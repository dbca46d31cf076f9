"""AdamW for fp32 masters and for bf16 parameters, with the vector loads that aligned tables allow."""

from __future__ import annotations

from danaus.kernels.adamw import _CONFIG, _adamw_kernel
from danaus.kernels.multi_tensor import CHUNK, TL_DTYPES

from ..aot import Build

SIGNATURE = {
    **dict.fromkeys(("addresses_ptr", "sizes_ptr"), "*i64"),
    **dict.fromkeys(("first_programs_ptr", "tensor_of_ptr"), "*i32"),
    "scale_ptr": "*fp32",
    **dict.fromkeys(
        ("decay", "one_minus_beta1", "beta2", "one_minus_beta2", "step_size", "root_correction2", "eps"), "fp32"
    ),
}


def builds() -> list[Build]:
    """One for each dtype of parameters; gradients and states have the same."""
    return [
        Build(
            name=f"adamw-{str(dtype).removeprefix('torch.')}",
            kernel=_adamw_kernel,
            signature=SIGNATURE,
            constexprs={
                "HAS_SCALE": True,
                **dict.fromkeys("PGM", kind),
                "ALIGNED": True,
                "CHUNK": CHUNK,
                "BLOCK": _CONFIG["BLOCK"],
            },
            num_warps=_CONFIG["num_warps"],
        )
        for dtype, kind in TL_DTYPES.items()
    ]
