"""The attention kernels as an H200 gets them: every default configuration, causal and with all features."""

from __future__ import annotations

import torch

from danaus.kernels.attention import _backward, _forward, api

from ..aot import Build

KERNELS = {
    "forward": (_forward._forward_kernel, api._forward_default),
    "dq": (_backward._dq_kernel, api._dq_default),
    "dkdv": (_backward._dkdv_kernel, api._dkdv_default),
}
TENSORS = {"forward": "q k v out", "dq": "q k v out grad dq", "dkdv": "q k v grad dk dv"}
POINTERS = {
    "forward": ("lse_ptr", "cu_q_ptr", "cu_k_ptr"),
    "dq": ("lse_ptr", "grad_lse_ptr", "delta_ptr", "cu_q_ptr", "cu_k_ptr"),
    "dkdv": ("lse_ptr", "delta_ptr", "cu_q_ptr", "cu_k_ptr"),
}
SIZES = {
    "forward": "batch num_heads group max_q max_k heads_per_section left right",
    "dq": "batch num_heads group max_q max_k heads_per_section left right",
    "dkdv": "batch num_kv_heads group heads_per_part max_q max_k heads_per_section left right",
}
# Bytes per thread that may go to local memory, by (kernel, head width, dtype, everything): the larger of Triton 3.6's
# and 3.7's. Two accumulators fill the registers of the dk dv kernel on purpose, and what spills is mostly what lies
# outside of the loop over tiles that are seen in full (api._dkdv_default says where it does not).
SPILLS: dict[tuple[str, int, str, bool], int] = {
    ("dkdv", 64, "bf16", False): 384,
    ("dkdv", 128, "bf16", False): 704,
    ("dkdv", 256, "bf16", False): 320,
    ("dkdv", 128, "bf16", True): 640,
    # Splitting fp32 into three tf32 takes registers; this path is there to be exact, not fast.
    ("forward", 128, "fp32", False): 64,
    ("dq", 128, "fp32", False): 192,
}


def builds() -> list[Build]:
    names = tuple(KERNELS)
    plain = [build(name, width, "bf16", everything=False) for name in names for width in (64, 128, 256)]
    rest = [build(name, 128, "bf16", everything=True) for name in names]
    single = [build(name, 128, "fp32", everything=False) for name in names]
    return [*plain, *rest, *single]


def build(name: str, width: int, dtype: str, *, everything: bool) -> Build:
    kernel, default = KERNELS[name]
    # A causal mask on dense sequences, or packed ones with a window and a softcap.
    constexprs: dict[str, object] = {
        "WIDTH": width,
        "BLOCK_D": width,
        "PACKED": everything,
        "HAS_LEFT": everything,
        "HAS_RIGHT": True,
        "BOTTOM_RIGHT": everything,
        "HAS_SOFTCAP": everything,
        "PRECISION": api.DKDV_PRECISION if name == "dkdv" else api.PRECISION,
        "LONG": False,
    }
    signature = {"scale": "fp32", "softcap": "fp32", **dict.fromkeys(SIZES[name].split(), "i32")}
    for tensor in TENSORS[name].split():
        signature[f"{tensor}_ptr"] = f"*{dtype}"
        signature.update({f"{tensor}_stride_{dim}": "i32:16" for dim in "bhs"})
        # Triton makes a constant of a stride that is 1.
        constexprs[f"{tensor}_stride_d"] = 1
    signature.update(dict.fromkeys(("lse_stride_b", "lse_stride_h"), "i32:16"))
    signature.update(dict.fromkeys(POINTERS[name], "*fp32"))
    for pointer in ("cu_q_ptr", "cu_k_ptr"):
        if everything:
            signature[pointer] = "*i32"
        else:
            del signature[pointer]
            constexprs[pointer] = None
    if name == "dq":
        constexprs["HAS_GRAD_LSE"] = everything
        if not everything:
            constexprs["grad_lse_ptr"] = signature.pop("grad_lse_ptr") and None
    if name == "dkdv":
        signature["part_stride"] = "i32:16"
    config = default(torch.empty(0, width, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16))
    constexprs |= {key: config.pop(key) for key in ("BLOCK_M", "BLOCK_N")}
    title = f"attention {name} d{width} {dtype}{' packed, window, softcap' if everything else ' causal'}"
    return Build(
        name=title,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        max_stack=SPILLS.get((name, width, dtype, everything), 0),
        wgmma=dtype == "bf16",
        **config,
    )
