"""What the benchmark measures: one case is one operation at one shape, done in several ways.

A part of the kernels offers its cases as ``cases() -> list[Case]`` in ``cases_<part>.py``; nothing is allocated before
a case runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..tuning import Config

Prepare = Callable[..., Callable[[], object]]
"""Takes a case's inputs, does what is not timed (packing weights, the forward of a backward), returns what is."""

Unit = Literal["TFLOP/s", "TOP/s", "TB/s", "x"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tune:
    """Which stored configuration a case decides, and the few worth trying for it."""

    op: str
    key: str
    candidates: Sequence[Config]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """An operation at one shape."""

    name: str
    """One word, or several joined by hyphens; ``--only`` takes it or its beginning."""
    shape: str
    """What the table says of the sizes, e.g. ``"T 16384, D 4096, bf16"``."""
    make: Callable[[torch.device, bool], tuple[Any, ...]]
    """``make(device, small)``: seeded random inputs; small ones take 1 to 4 tiles, in dtypes the interpreter knows."""
    variants: dict[str, Prepare]
    """By name; "triton" is ours, "reference" is what the others are compared with before anything is timed."""
    unit: Unit
    work: float
    """Floating point operations, integer operations or bytes of a call at full size; bytes for the unit "x"."""
    good: float | None = None
    top: float | None = None
    baseline: str = "torch"
    """For the unit "x": the variant whose time is divided by that of "triton"."""
    tolerance: float = 2e-2
    """Largest norm(result - reference) / norm(reference) on small inputs."""
    tune: Tune | None = None


def call(function: Callable[..., object], **options: object) -> Prepare:
    """Time ``function(*inputs, **options)``."""

    def prepare(*inputs: object) -> Callable[[], object]:
        return lambda: function(*inputs, **options)

    return prepare


def compiled(function: Callable[..., object], **options: object) -> Prepare:
    """Time ``torch.compile(function)(*inputs, **options)``, compiled before."""

    def prepare(*inputs: object) -> Callable[[], object]:
        fast: Any = torch.compile(function, dynamic=False)
        return lambda: fast(*inputs, **options)

    return prepare


def backward(function: Callable[..., Any], *, compile_it: bool = False, **options: object) -> Prepare:
    """Time the gradients of ``function`` for every input that requires one; the forward runs once, before.

    Of several results of the function, the first is the one that is differentiated.
    """

    def prepare(*inputs: object) -> Callable[[], object]:
        called: Any = torch.compile(function, dynamic=False) if compile_it else function
        result = called(*inputs, **options)
        output: torch.Tensor = result[0] if isinstance(result, tuple) else result
        leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
        # The same gradient for every variant of a case.
        seed = torch.Generator(device=output.device).manual_seed(1)
        grad = torch.randn(output.shape, generator=seed, device=output.device, dtype=torch.float32).to(output.dtype)
        return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)

    return prepare
