"""The head's loss: fused with its matrix product, and of logits that are there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cross_entropy import cross_entropy, linear_cross_entropy
from .case import Case, Prepare, Tune, backward, call, compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..tuning import Config

TOKENS, WIDTH, VOCAB = 8192, 4096, 131072

# What a tile's sums leave of the registers, how deep loads are pipelined, how long a block stays in the L2 cache.
TILES: Sequence[Config] = (
    {"BLOCK_N": 128, "BLOCK_V": 128, "num_warps": 8, "num_stages": 4},
    {"BLOCK_N": 128, "BLOCK_V": 256, "num_warps": 8, "num_stages": 4},
    {"BLOCK_N": 256, "BLOCK_V": 128, "num_warps": 8, "num_stages": 3},
    {"BLOCK_N": 128, "BLOCK_V": 128, "num_warps": 4, "num_stages": 4},
    {"BLOCK_N": 128, "BLOCK_V": 256, "num_warps": 8, "num_stages": 3, "GROUP": 8},
)
OP = "linear_cross_entropy"


def cases() -> list[Case]:
    """Return the loss alone and with its gradients; operations are those without any recomputed."""
    name, flops = OP.replace("_", "-"), 2.0 * TOKENS * WIDTH * VOCAB
    shape = f"N {TOKENS}, D {WIDTH}, V {VOCAB}, bf16"
    key = f"D{WIDTH},16"
    return [
        Case(
            name=name,
            shape=shape,
            make=make_linear,
            variants={
                "reference": call(linear_cross_entropy, impl="reference"),
                "triton": call(linear_cross_entropy, impl="triton"),
                "torch": call(linear_cross_entropy, impl="torch"),
                "torch.compile": compiled(linear_cross_entropy, impl="reference"),
            },
            unit="TFLOP/s",
            work=flops,
            good=350,
            top=500,
            tune=Tune(op=OP, key=key, candidates=TILES),
        ),
        Case(
            name=f"{name}-backward",
            shape=f"{shape}, with the forward",
            make=make_linear,
            variants={
                "reference": both(linear_cross_entropy, impl="reference"),
                "triton": both(linear_cross_entropy, impl="triton"),
                "torch": both(linear_cross_entropy, impl="torch"),
                "torch.chunked": both(torch_chunked),
            },
            unit="TFLOP/s",
            work=3 * flops,
            good=350,
            top=500,
            tune=Tune(op=f"{OP}_backward", key=key, candidates=TILES),
        ),
        *plain_cases(),
    ]


def make_linear(device: torch.device, small: bool) -> tuple[Tensor, ...]:
    """Logits of about unit variance."""
    num_rows, width, vocab = (20, 40, 70) if small else (TOKENS, WIDTH, VOCAB)
    dtype = torch.float32 if small and device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(num_rows, width, generator=generator, device=device).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator, device=device) / width**0.5).to(dtype)
    targets = torch.randint(0, vocab, (num_rows,), generator=generator, device=device)
    return x.requires_grad_(), weight.requires_grad_(), targets


def both(function: Callable[..., Any], **options: Any) -> Prepare:
    """Time loss and gradients together: some keep the gradients from the forward, others compute logits again."""

    def prepare(*inputs: Tensor) -> Callable[[], object]:
        leaves = [x for x in inputs if x.requires_grad]
        return lambda: torch.autograd.grad(function(*inputs, **options), leaves)

    return prepare


def torch_chunked(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Torch 2.13's own form that saves memory."""
    options: Any = torch.nn.LinearCrossEntropyOptions()  # pyright: ignore[reportAttributeAccessIssue]
    function: Any = torch.nn.functional.linear_cross_entropy  # pyright: ignore[reportAttributeAccessIssue]
    return function(x, weight, targets, options=options)


def plain_cases() -> list[Case]:
    """Logits are read once forward; read and written once backward."""
    num_rows = 4096

    def make(device: torch.device, small: bool) -> tuple[Tensor, Tensor]:
        rows, vocab = (5, 70) if small else (num_rows, VOCAB)
        dtype = torch.float32 if small and device.type == "cpu" else torch.bfloat16
        generator = torch.Generator(device).manual_seed(0)
        logits = torch.randn(rows, vocab, generator=generator, device=device).to(dtype).requires_grad_()
        return logits, torch.randint(0, vocab, (rows,), generator=generator, device=device)

    size = 2.0 * num_rows * VOCAB
    return [
        Case(
            name=f"cross-entropy{suffix}",
            shape=f"N {num_rows}, V {VOCAB}, bf16",
            make=make,
            variants={impl: prepare(cross_entropy, impl=impl) for impl in ("reference", "triton", "torch")},
            unit="TB/s",
            work=work,
            good=3.65,
            top=4.1,
        )
        for suffix, prepare, work in (("", call, size), ("-backward", backward, 2 * size))
    ]
