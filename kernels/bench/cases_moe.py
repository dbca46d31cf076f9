"""Mixture of experts: 64 of them, 4096 features, 1536 hidden ones; routed at random, or most tokens to few experts."""

from __future__ import annotations

from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ..moe import grouped_mm, moe_mlp, permute, route, sort_by_expert, unpermute
from ..moe.grouped import config_key
from .case import Case, Prepare, Tune, backward, call

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..launch import Impl

EXPERTS, FEATURES, HIDDEN, CHOICES = 64, 4096, 1536, 4

# What else may be best: fewer stages, the next tile's loads under this one's stores, two blocks a multiprocessor that
# hide each other's ends, pointers instead of descriptors, the other long tile.
CANDIDATES = [
    {"num_stages": 3},
    {"num_stages": 3, "FLATTEN": 1},
    {"FLATTEN": 1},
    {"BLOCK_N": 128, "num_warps": 4, "num_stages": 3, "PER_SM": 2},
    {"num_stages": 3, "TMA": 0},
    {"BLOCK_M": 256, "BLOCK_N": 128},
    {"GROUP": 4},
]
# Its two loops are not made one.
CANDIDATES_OF_WEIGHTS = [config for config in CANDIDATES if "FLATTEN" not in config]


def cases() -> list[Case]:
    """Return the cases, the one with a goal first."""
    return [
        _grouped("moe-grouped", 1024, good=450.0, top=600.0, tunes="grouped_mm"),
        _grouped("moe-grouped-few", 256, good=450.0, top=600.0, tunes="grouped_mm"),
        _grouped("moe-grouped-skewed", 1024),
        _grouped("moe-grouped-dx", 1024, grad="x", tunes="grouped_mm"),
        _grouped("moe-grouped-dw", 1024, grad="w", tunes="grouped_mm_weight_grad"),
        _grouped("moe-grouped-dw-few", 256, grad="w", tunes="grouped_mm_weight_grad"),
        *_mlp(),
        *_parts(),
    ]


def _grouped(
    name: str,
    mean: int,
    *,
    grad: str = "",
    good: float | None = None,
    top: float | None = None,
    tunes: str = "",
) -> Case:
    skewed = name.endswith("skewed")
    rows = "most rows in few" if skewed else f"{mean} rows each"
    wrap = backward if grad else call
    # The gradients of x and of weights laid out [X, F, D] both turn F into D.
    sides = (HIDDEN, FEATURES) if grad else (FEATURES, HIDDEN)
    return Case(
        name=name,
        shape=f"{EXPERTS} experts, {rows}, D {FEATURES}, F {HIDDEN}, bf16",
        make=partial(_make_grouped, mean, skewed, grad),
        variants={
            "reference": wrap(partial(_grouped_by_us, impl="reference")),
            "triton": wrap(_grouped_by_us),
            "torch": wrap(_grouped_by_torch),
            "loop": _with_counts(_loop, wrap),
        },
        unit="TFLOP/s",
        work=2 * EXPERTS * mean * FEATURES * HIDDEN,
        good=good,
        top=top,
        tune=_tune(tunes, mean, sides) if tunes else None,
    )


def _tune(op: str, mean: int, sides: tuple[int, int]) -> Tune:
    candidates = CANDIDATES if op == "grouped_mm" else CANDIDATES_OF_WEIGHTS
    return Tune(op=op, key=config_key(torch.bfloat16, mean, *sides), candidates=candidates)


def _make_grouped(mean: int, skewed: bool, grad: str, device: torch.device, small: bool) -> tuple[Any, ...]:
    counts = [100, 0, 190, 30] if small else _counts(mean, skewed)
    num_in, num_out = (64, 128) if small else (FEATURES, HIDDEN)
    x = _normal((sum(counts), num_in), device, 0).requires_grad_(grad == "x")
    w = _normal((len(counts), num_out, num_in), device, 1).div_(num_in**0.5).requires_grad_(grad == "w")
    offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
    return x, w, offsets


def _counts(mean: int, skewed: bool) -> list[int]:
    """Return how many rows each expert has: about ``mean``, or by Zipf's law; as many altogether."""
    generator = torch.Generator().manual_seed(0)
    share = 1.0 / torch.arange(1, EXPERTS + 1) if skewed else torch.ones(EXPERTS)
    chosen = torch.multinomial(share, EXPERTS * mean, replacement=True, generator=generator)
    return chosen.bincount(minlength=EXPERTS).tolist()


def _mlp() -> list[Case]:
    tokens = EXPERTS * 1024 // CHOICES
    shape = f"T {tokens}, {EXPERTS} experts, {CHOICES} choices, D {FEATURES}, F {HIDDEN}, bf16"
    work = 6 * tokens * CHOICES * FEATURES * HIDDEN
    return [
        Case(
            name=f"moe-mlp{suffix}",
            shape=shape,
            make=partial(_make_mlp, tokens, bool(suffix)),
            variants={
                "reference": wrap(moe_mlp, impl="reference"),
                "triton": wrap(moe_mlp),
                "torch": wrap(moe_mlp, impl="torch"),
            },
            unit="TFLOP/s",
            work=work * times,
        )
        for suffix, wrap, times in (("", call, 1), ("-backward", backward, 2))
    ]


def _make_mlp(tokens: int, grad: bool, device: torch.device, small: bool) -> tuple[Any, ...]:
    num_tokens, experts, features, hidden = (40, 4, 32, 64) if small else (tokens, EXPERTS, FEATURES, HIDDEN)
    x = _normal((num_tokens, features), device, 0).requires_grad_(grad)
    weights, chosen = route(_normal((num_tokens, experts), device, 1), CHOICES // 2 if small else CHOICES, impl="torch")
    shapes = ((experts, hidden, features), (experts, hidden, features), (experts, features, hidden))
    matrices = [_normal(s, device, seed).div_(s[2] ** 0.5).requires_grad_(grad) for seed, s in enumerate(shapes, 2)]
    return x, weights.requires_grad_(grad), chosen, *matrices


def _parts() -> list[Case]:
    tokens, choices = 65536, 8
    rows_bytes = 2 * FEATURES * EXPERTS * 1024
    return [
        Case(
            name="moe-route",
            shape=f"T {tokens}, {EXPERTS} experts, {choices} choices, bf16",
            make=lambda device, small: (_normal((5 if small else tokens, EXPERTS), device, 0), 2 if small else choices),
            variants=_impls(route),
            unit="TB/s",
            work=tokens * (EXPERTS * 2 + choices * 12),
        ),
        Case(
            name="moe-sort",
            shape=f"T {tokens}, {EXPERTS} experts, {choices} choices",
            make=lambda device, small: _make_order(20 if small else tokens, 2 if small else choices, device),
            variants=_impls(sort_by_expert),
            unit="TB/s",
            # The experts twice, row and place once.
            work=tokens * choices * (2 * 8 + 2 * 4),
        ),
        Case(
            name="moe-permute",
            shape=f"{EXPERTS * 1024} rows, {CHOICES} choices, D {FEATURES}, bf16",
            make=partial(_make_rows, False),
            variants=_impls(permute),
            unit="TB/s",
            # Every choice is written, its token read once.
            work=rows_bytes + rows_bytes / CHOICES,
        ),
        Case(
            name="moe-unpermute",
            shape=f"{EXPERTS * 1024} rows, {CHOICES} choices, D {FEATURES}, bf16",
            make=partial(_make_rows, True),
            variants=_impls(unpermute),
            unit="TB/s",
            work=rows_bytes + rows_bytes / CHOICES,
        ),
    ]


def _make_order(tokens: int, choices: int, device: torch.device) -> tuple[torch.Tensor, int]:
    return route(_normal((tokens, EXPERTS), device, 0), choices, impl="torch")[1], EXPERTS


def _make_rows(back: bool, device: torch.device, small: bool) -> tuple[Any, ...]:
    tokens = 12 if small else EXPERTS * 1024 // CHOICES
    weights, chosen = route(_normal((tokens, EXPERTS), device, 0), CHOICES, impl="torch")
    order = sort_by_expert(chosen, EXPERTS, impl="torch")
    x = _normal((tokens * CHOICES if back else tokens, 48 if small else FEATURES), device, 1)
    return (x, order, weights) if back else (x, order)


def _impls(function: Callable[..., object]) -> dict[str, Prepare]:
    return {impl: call(function, impl=impl) for impl in ("reference", "triton", "torch")}


def _grouped_by_us(
    x: torch.Tensor, w_XFD: torch.Tensor, offsets: torch.Tensor, *, impl: Impl = "triton"
) -> torch.Tensor:
    return grouped_mm(x, w_XFD.mT, offsets, impl=impl)


def _grouped_by_torch(x: torch.Tensor, w_XFD: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return functional.grouped_mm(x, w_XFD.mT, offs=offsets[1:])


def _loop(x: torch.Tensor, w_XFD: torch.Tensor, bounds: Sequence[int]) -> torch.Tensor:
    return torch.cat([x[first:end] @ w_XFD[e].t() for e, (first, end) in enumerate(pairwise(bounds))])


def _with_counts(function: Callable[..., torch.Tensor], wrap: Callable[..., Prepare]) -> Prepare:
    """Time a function that wants the offsets on the host, which gets them for nothing."""

    def prepare(*inputs: Any) -> Callable[[], object]:
        *tensors, offsets = inputs
        return wrap(function)(*tensors, offsets.tolist())

    return prepare


def _normal(shape: tuple[int, ...], device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    # The interpreter does not know bf16.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)
