"""AdamW with 8-bit states for fp32 masters and for bf16 parameters."""

from __future__ import annotations

import torch

from danaus.kernels.adam8bit import _CONFIG, BLOCK_SIZE, _adam8bit_kernel
from danaus.kernels.multi_tensor import CHUNK, TL_DTYPES

from ..aot import Build

SIGNATURE = {
    **dict.fromkeys(("addresses_ptr", "sizes_ptr"), "*i64"),
    **dict.fromkeys(("first_programs_ptr", "tensor_of_ptr"), "*i32"),
    **dict.fromkeys(("signed_ptr", "signed_edges_ptr", "unsigned_ptr", "unsigned_edges_ptr"), "*fp32"),
    **dict.fromkeys(
        ("decay", "one_minus_beta1", "beta2", "one_minus_beta2", "step_size", "root_correction2", "eps"), "fp32"
    ),
}


def builds() -> list[Build]:
    """One for each dtype of parameters; gradients have the same."""
    return [
        Build(
            name=f"adam8bit-{str(dtype).removeprefix('torch.')}",
            kernel=_adam8bit_kernel,
            signature=SIGNATURE,
            constexprs={
                "P": TL_DTYPES[dtype],
                "G": TL_DTYPES[dtype],
                "ALIGNED": True,
                "CHUNK": CHUNK,
                "BLOCKS": _CONFIG["BLOCKS"],
                "SIZE": BLOCK_SIZE,
            },
            num_warps=_CONFIG["num_warps"],
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
