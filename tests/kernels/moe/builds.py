"""The kernels of a mixture of experts as an H200 gets them: 64 experts, 2 choices, D 4096, F 1536."""

from __future__ import annotations

import torch

from danaus.kernels.moe import _glu, _grouped, grouped, order, permutation, routing

from ..aot import Build

GROUPED = "num_rows num_in num_out num_experts x_stride w_stride_x w_stride_in w_stride_out"
WEIGHT_GRAD = "num_rows num_a num_b num_experts a_stride b_stride"


def builds() -> list[Build]:
    return [
        grouped_build("bf16", 1024, in_last=True),
        grouped_build("bf16", 1024, in_last=False),
        grouped_build("bf16", 1024, in_last=False, add=True),
        grouped_build("bf16", 1024, in_last=True, tma=0),
        grouped_build("bf16", 1024, in_last=False, tma=0),
        grouped_build("bf16", 16, in_last=True),
        grouped_build("bf16", 16, in_last=False),
        grouped_build("fp32", 1024, in_last=True),
        grouped_build("fp32", 1024, in_last=False),
        weight_grad_build("bf16"),
        weight_grad_build("bf16", tma=0),
        weight_grad_build("fp32"),
        *(route_build(name, num_experts) for name in ("forward", "backward") for num_experts in (64, 4096)),
        *(sort_build(name, num_experts) for name in ("count", "place") for num_experts in (64, 4096)),
        *row_builds(),
    ]


def route_build(name: str, num_experts: int) -> Build:
    signature = {"logits_ptr": "*bf16", "weights_ptr": "*fp32", "experts_ptr": "*i64"}
    signature |= {"logits_stride": "i32:16", "num_tokens": "i32", "num_experts": "i32:16"}
    if name == "backward":
        signature |= {"dweights_ptr": "*fp32", "dlogits_ptr": "*bf16"}
    config = routing.default_config(num_experts)
    return Build(
        name=f"moe route {name} {num_experts}",
        kernel=routing._route_kernel if name == "forward" else routing._route_backward_kernel,
        signature=signature,
        constexprs={
            "K": 8,
            # The longer way of each.
            "NORMALIZE": False,
            "ROWS": config["ROWS"],
            "BLOCK_X": num_experts,
            "BLOCK_K": 8,
        },
        num_warps=config["num_warps"],
    )


def sort_build(name: str, num_experts: int) -> Build:
    signature = {"experts_ptr": "*i64", **dict.fromkeys(("num_tokens", "num_assignments", "num_experts"), "i32")}
    outputs = ("counts_ptr",) if name == "count" else ("before_ptr", "offsets_ptr", "source_ptr", "place_ptr")
    config = order.default_config(num_experts)
    return Build(
        name=f"moe sort {name} {num_experts}",
        kernel=order._count_kernel if name == "count" else order._place_kernel,
        signature=signature | dict.fromkeys(outputs, "*i32"),
        constexprs={"K": 2, "BLOCK": config["BLOCK"], "BLOCK_X": num_experts},
        num_warps=config["num_warps"],
    )


def row_builds() -> list[Build]:
    sizes = {"num_cols": "i32:16", "blocks_per_row": "i32"}
    weighted: dict[str, object] = {"K": 2, "HAS_WEIGHTS": True, "BLOCK": permutation.MAX_BLOCK}
    plain: dict[str, object] = {"BLOCK": permutation.MAX_BLOCK}
    listed: list[tuple[str, object, str, dict[str, str], dict[str, object]]] = [
        (
            "permute",
            permutation._permute_kernel,
            "x out",
            {"source_ptr": "*i32", "x_stride": "i32:16", **sizes},
            weighted,
        ),
        (
            "unpermute",
            permutation._unpermute_kernel,
            "ys out",
            {"place_ptr": "*i32", "ys_stride": "i32:16", **sizes},
            weighted,
        ),
        (
            "weight grad",
            permutation._weight_grad_kernel,
            "dy ys",
            {
                "place_ptr": "*i32",
                "dweights_ptr": "*fp32",
                **dict.fromkeys(("dy_stride", "ys_stride", "num_cols"), "i32:16"),
            },
            {"K": 2, **plain},
        ),
        ("swiglu", _glu._weighted_swiglu_kernel, "gate up act", {"source_ptr": "*i32", **sizes}, plain),
        (
            "swiglu backward",
            _glu._weighted_swiglu_backward_kernel,
            "dact gate up act dgate dup",
            {"source_ptr": "*i32", "dweights_ptr": "*fp32", "num_cols": "i32:16"},
            plain,
        ),
    ]
    return [
        Build(
            name=f"moe {name}",
            kernel=kernel,
            signature={f"{tensor}_ptr": "*bf16" for tensor in tensors.split()}
            | ({} if name == "weight grad" else {"weights_ptr": "*fp32"})
            | rest,
            constexprs=constexprs,
        )
        for name, kernel, tensors, rest, constexprs in listed
    ]


def config_of(dtype: str, rows: int, tma: int | None, *, weight_grad: bool = False) -> dict[str, int]:
    config = grouped.default_config(
        {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], rows, weight_grad=weight_grad
    )
    del config["PER_SM"]
    return config if tma is None else {**config, "TMA": tma}


def grouped_build(
    dtype: str,
    rows: int,
    *,
    in_last: bool,
    tma: int | None = None,
    add: bool = False,
    change: dict[str, int] | None = None,
) -> Build:
    config = config_of(dtype, rows, tma) | (change or {})
    with_tma = bool(config.pop("TMA"))
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    signature = dict.fromkeys(GROUPED.split(), "i32:16") | {"num_rows": "i32", "num_experts": "i32"}
    signature |= {"offsets_ptr": "*i32"} | dict.fromkeys(("x_ptr", "w_ptr", "out_ptr"), f"*{dtype}")
    constexprs: dict[str, object] = {
        "GROUPS": 128,
        "HAS_ADD": add,
        "TMA": with_tma,
        "IN_LAST": in_last,
        "PRECISION": "tf32x3",
        "UPCAST": False,
        **{name: config.pop(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "FLATTEN")},
    }
    # Triton makes a constant of a stride that is 1.
    unit = "w_stride_in" if in_last else "w_stride_out"
    del signature[unit]
    constexprs[unit] = 1
    if with_tma:
        signature["x_desc"] = f"tensordesc<{dtype}[{block_m}, {block_k}]>"
        w_block = (block_n, block_k) if in_last else (block_k, block_n)
        signature["w_desc"] = f"tensordesc<{dtype}[{w_block[0]}, {w_block[1]}]>"
    else:
        constexprs |= {"x_desc": None, "w_desc": None}
    if add:
        signature["add_ptr"] = f"*{dtype}"
    else:
        constexprs["add_ptr"] = None
    words = [dtype, f"{rows} rows", "w[F, D]" if in_last else "w[D, F]"]
    words += ["tma"] * with_tma + ["add"] * add + [str(change)] * bool(change)
    return Build(
        name=f"moe grouped {' '.join(words)}",
        kernel=_grouped._grouped_kernel,
        signature=signature,
        constexprs=constexprs,
        wgmma=dtype == "bf16",
        **config,
    )


def weight_grad_build(dtype: str, *, tma: int | None = None, change: dict[str, int] | None = None) -> Build:
    config = config_of(dtype, 1024, tma, weight_grad=True) | (change or {})
    with_tma = bool(config.pop("TMA"))
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    signature = dict.fromkeys(WEIGHT_GRAD.split(), "i32:16") | {"num_rows": "i32", "num_experts": "i32"}
    signature |= {"offsets_ptr": "*i32"} | dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), f"*{dtype}")
    constexprs: dict[str, object] = {
        "TMA": with_tma,
        "PRECISION": "tf32x3",
        "UPCAST": False,
        **{name: config.pop(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "FLATTEN")},
    }
    if with_tma:
        signature["a_desc"] = f"tensordesc<{dtype}[{block_k}, {block_m}]>"
        signature["b_desc"] = f"tensordesc<{dtype}[{block_k}, {block_n}]>"
    else:
        constexprs |= {"a_desc": None, "b_desc": None}
    words = [dtype] + ["tma"] * with_tma + [str(change)] * bool(change)
    return Build(
        name=f"moe grouped weight grad {' '.join(words)}",
        kernel=_grouped._grouped_weight_grad_kernel,
        signature=signature,
        constexprs=constexprs,
        wgmma=dtype == "bf16",
        **config,
    )
