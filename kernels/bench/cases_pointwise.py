"""Norms, rotary positions, activations, optimizers, sampling: all of them read and write memory and little else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..activations import geglu, swiglu
from ..adam8bit import adam8bit_, new_state
from ..adamw import adamw_
from ..layernorm import layernorm
from ..rmsnorm import rmsnorm
from ..rope import rope
from ..sampling import sample
from .case import Case, Prepare, Tune, backward, call, compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..tuning import Config

TOKENS = 16384
GOOD, TOP = 3.65, 4.1
"""85 % and 95 % of the 4.3 TB/s at which an H200 copies."""

# Fewer warps leave more registers and loads to each thread, more hide more of the memory's delay.
ROW_WARPS: Sequence[Config] = ({"num_warps": 4}, {"num_warps": 16}, {"ROWS": 2}, {"ROWS": 2, "num_warps": 16})
FLAT: Sequence[Config] = ({"BLOCK": 1024}, {"BLOCK": 4096, "num_warps": 8}, {"BLOCK": 1024, "num_warps": 2})
ROPE: Sequence[Config] = ({"TOKENS": 4}, {"TOKENS": 1, "HEADS": 32}, {"TOKENS": 2, "HEADS": 32, "num_warps": 8})


def cases() -> list[Case]:
    """Return forward and backward of what the decoder is made of, then the optimizers and sampling."""
    found: list[Case] = []
    for width in (4096, 8192):
        found += norm_cases("rmsnorm", rmsnorm, width, num_vectors=1)
    found += residual_cases(4096)
    found += norm_cases("layernorm", layernorm, 4096, num_vectors=2)
    found += rope_cases()
    found += gated_cases("swiglu", swiglu, 14336)
    found += gated_cases("geglu", geglu, 14336)
    return [*found, adamw_case(), adam8bit_case(), sampling_case()]


def normal(shape: tuple[int, ...], device: torch.device, small: bool, *, seed: int = 0, grad: bool = True) -> Tensor:
    """Random normal numbers, in bf16 where a GPU computes with them."""
    dtype = torch.float32 if small and device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_(grad)


def implementations(function: Callable[..., Any], *, has_torch: bool = True) -> dict[str, Prepare]:
    """Call the function in every way there is."""
    made = {"reference": call(function, impl="reference"), "triton": call(function, impl="triton")}
    if has_torch:
        made["torch"] = call(function, impl="torch")
    return {**made, "torch.compile": compiled(function, impl="reference")}


def gradients(function: Callable[..., Any], *, has_torch: bool = True) -> dict[str, Prepare]:
    """Differentiate the function in every way there is."""
    made = {"reference": backward(function, impl="reference"), "triton": backward(function, impl="triton")}
    if has_torch:
        made["torch"] = backward(function, impl="torch")
    return {**made, "torch.compile": backward(function, impl="reference", compile_it=True)}


def norm_cases(name: str, function: Callable[..., Any], width: int, *, num_vectors: int) -> list[Case]:
    """Forward reads x and writes y; backward reads x and dy and writes dx."""

    def make(device: torch.device, small: bool) -> tuple[Tensor, ...]:
        rows, cols = (8, 200) if small else (TOKENS, width)
        vectors = [normal((cols,), device, small, seed=seed) for seed in range(1, 1 + num_vectors)]
        return normal((rows, cols), device, small), *vectors

    shape, size = f"T {TOKENS}, D {width}, bf16", 2 * TOKENS * width
    return [
        memory_case(
            name, shape, make, implementations(function), 2 * size, Tune(op=name, key=f"D{width}", candidates=ROW_WARPS)
        ),
        memory_case(
            f"{name}-backward",
            shape,
            make,
            gradients(function),
            3 * size,
            Tune(op=f"{name}_backward", key=f"D{width}", candidates=ROW_WARPS),
        ),
    ]


def residual_cases(width: int) -> list[Case]:
    """The norm behind a residual addition: two reads and two writes."""

    def make(device: torch.device, small: bool) -> tuple[Tensor, ...]:
        rows, cols = (8, 200) if small else (TOKENS, width)
        shapes = ((rows, cols), (cols,), (rows, cols))
        return tuple(normal(shape, device, small, seed=seed) for seed, shape in enumerate(shapes))

    def added(x: Tensor, weight: Tensor, residual: Tensor, **options: Any) -> Any:
        return rmsnorm(x, weight, residual=residual, **options)

    shape = f"T {TOKENS}, D {width}, bf16"
    return [memory_case("rmsnorm-residual", shape, make, implementations(added), 8 * TOKENS * width)]


def rope_cases() -> list[Case]:
    """Queries as a projection leaves them, tokens before heads."""
    heads, width, length = 32, 128, 4096

    def make(device: torch.device, small: bool) -> tuple[Tensor, ...]:
        shape = (1, 5, 3, 16) if small else (TOKENS // length, length, heads, width)
        x = normal(shape, device, small).detach().transpose(1, 2).requires_grad_()
        angle = torch.outer(torch.arange(shape[1]), 0.01 ** torch.linspace(0, 1, shape[3] // 2)).to(device)
        return x, angle.cos(), angle.sin()

    shape, size = f"T {TOKENS}, H {heads}, E {width}, bf16", 2 * TOKENS * heads * width
    tune = Tune(op="rope", key=f"E{width},H{heads}", candidates=ROPE)
    return [
        memory_case("rope", shape, make, implementations(rope, has_torch=False), 2 * size, tune),
        memory_case("rope-backward", shape, make, gradients(rope, has_torch=False), 2 * size),
    ]


def gated_cases(name: str, function: Callable[..., Any], width: int) -> list[Case]:
    """Forward reads two and writes one, backward reads three and writes two."""

    def make(device: torch.device, small: bool) -> tuple[Tensor, ...]:
        shape = (4, 300) if small else (TOKENS, width)
        return normal(shape, device, small), normal(shape, device, small, seed=1)

    def tuned(key: str) -> Tune | None:
        return Tune(op="gated_activation", key=key, candidates=FLAT) if name == "swiglu" else None

    shape, size = f"T {TOKENS}, F {width}, bf16", 2 * TOKENS * width
    return [
        memory_case(name, shape, make, implementations(function), 3 * size, tuned("forward")),
        memory_case(f"{name}-backward", shape, make, gradients(function), 5 * size, tuned("backward")),
    ]


def memory_case(
    name: str,
    shape: str,
    make: Callable[[torch.device, bool], tuple[Any, ...]],
    variants: dict[str, Prepare],
    num_bytes: float,
    tune: Tune | None = None,
) -> Case:
    """A case whose speed is that of memory."""
    return Case(
        name=name, shape=shape, make=make, variants=variants, unit="TB/s", work=num_bytes, good=GOOD, top=TOP, tune=tune
    )


def adamw_case() -> Case:
    """A model of many tensors, a quarter of a billion fp32 parameters."""
    sizes = [(4096, 4096)] * 12 + [(4096,)] * 24 + [(4096, 14336)]

    def make(device: torch.device, small: bool) -> tuple[list[Tensor], ...]:
        shapes = [(7, 9), (300,)] if small else sizes
        generator = torch.Generator(device).manual_seed(0)
        drawn = [[torch.randn(s, generator=generator, device=device) for s in shapes] for _ in range(4)]
        return *drawn[:3], [v.square() for v in drawn[3]]

    def step(*lists: list[Tensor], impl: Any) -> list[Tensor]:
        adamw_(*lists, step=10, lr=1e-3, impl=impl)  # pyright: ignore[reportCallIssue]
        return lists[0]

    num_parameters = sum(torch.Size(size).numel() for size in sizes)
    return memory_case(
        "adamw",
        f"{num_parameters / 1e6:.0f} M parameters in {len(sizes)} tensors, fp32",
        make,
        {impl: call(step, impl=impl) for impl in ("reference", "triton", "torch")},
        28 * num_parameters,
        Tune(op="adamw", key="any", candidates=FLAT),
    )


def adam8bit_case() -> Case:
    """The same with 8-bit states, in bf16."""
    size = (16384, 16384)

    def make(device: torch.device, small: bool) -> tuple[Any, ...]:
        p = normal((5, 300) if small else size, device, small, grad=False)
        g = normal(tuple(p.shape), device, small, seed=1, grad=False)
        return p, g, new_state(p, signed=True), new_state(p, signed=False)

    def step(p: Tensor, g: Tensor, m: Any, v: Any, *, impl: Any) -> Tensor:
        adam8bit_([p], [g], [m], [v], step=10, lr=1e-3, impl=impl)
        return p

    return memory_case(
        "adam8bit",
        "268 M parameters, bf16",
        make,
        {impl: call(step, impl=impl) for impl in ("reference", "triton")},
        10 * size[0] * size[1],
        Tune(op="adam8bit", key="any", candidates=({"BLOCKS": 4}, {"BLOCKS": 16, "num_warps": 8}, {"num_warps": 8})),
    )


def sampling_case() -> Case:
    """Top-k and top-p for a batch of decoding sequences; the reference sorts every row."""
    batch, vocab = 64, 131072

    def make(device: torch.device, small: bool) -> tuple[Tensor]:
        return (2 * normal((2, 40) if small else (batch, vocab), device, small, grad=False).float(),)

    options: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}

    variants = {impl: call(sample, seed=0, impl=impl, **options) for impl in ("reference", "triton")}
    return Case(
        name="sampling",
        shape=f"B {batch}, V {vocab}, fp32, top-k 50, top-p 0.9",
        make=make,
        variants=variants,
        unit="TB/s",
        # As if every row were read once.
        work=4 * batch * vocab,
        tune=Tune(
            op="sampling",
            key=f"V{vocab}",
            candidates=({"BLOCK": 8192, "num_warps": 32}, {"BLOCK": 2048, "num_warps": 8}, {"BLOCK": 8192}),
        ),
    )
