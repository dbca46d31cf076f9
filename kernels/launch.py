"""What every wrapper checks before it launches a kernel, and the way to triton for machines that have none.

Operations import ``triton`` and ``tl`` from here, so that their references work where triton is not installed. There
the names stand for an object that takes any attribute and decorates any function; only a launch raises.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast, get_args

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import triton.language as tl

    # What it decorates takes a grid and options that its stubs know nothing of.
    triton: Any

Impl = Literal["reference", "triton", "torch"]
IMPLS: tuple[Impl, ...] = get_args(Impl)

LAUNCH_MAX = 2**31 - 1
"""Programs that the first axis of a grid may have; the others take 65535."""


class MissingTritonError(ImportError):
    """A kernel was launched where triton is not installed."""

    def __init__(self) -> None:
        super().__init__("triton is not installed: pip install 'danaus[gpu]', or pass impl=\"reference\"")


class _Absent:
    """Stands for triton, its language, a kernel and a type in turn."""

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: object, **__: object) -> _Absent:
        return self

    def __getitem__(self, grid: object) -> NoReturn:
        raise MissingTritonError


HAS_TRITON: bool = True
if not TYPE_CHECKING:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = tl = _Absent()
        HAS_TRITON = False

# Triton reads it once as well: when a kernel is decorated.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "on"}


def is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: slow, and wrong for bf16 arithmetic."""
    return HAS_TRITON and _INTERPRETING


def check_device(op: str, impl: str, *tensors: torch.Tensor | None, choices: Sequence[str] = IMPLS) -> None:
    """Refuse what no kernel of ``op`` could run; the first line of every wrapper.

    Args:
        op: The operation's name, for the message.
        impl: What the caller asked for.
        tensors: Its inputs; None stands for one that was left out.
        choices: The implementations that ``op`` has.

    Raises:
        ValueError: ``impl`` is none of ``choices``, the tensors lie on several devices, or on one without the kernel,
            or on a GPU that is not the current one.
        MissingTritonError: ``impl`` is "triton", which is not installed.
    """
    if impl not in choices:
        raise ValueError(f"{op}: impl={impl!r} is not there, it has {', '.join(map(repr, choices))}")
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{op}: the tensors are on {names}, move them to one device")
    if impl != "triton":
        return
    if not HAS_TRITON:
        raise MissingTritonError
    for device in devices:
        if device.type not in {"cuda", "meta"} and not is_interpreting():
            raise ValueError(
                f'{op}: impl="triton" needs tensors on a GPU, these are on {device}: move them there, pass '
                f'impl="reference", or start the process with TRITON_INTERPRET=1'
            )
        if device.type == "cuda" and not torch.compiler.is_compiling():
            _check_current(op, device)


def _check_current(op: str, device: torch.device) -> None:
    """Refuse another GPU than the current one: Triton would launch there, with addresses of this one."""
    index, current = cast("int | None", device.index), torch.cuda.current_device()
    if index is not None and index != current:
        raise ValueError(
            f"{op}: the tensors are on cuda:{index} and the current GPU is cuda:{current}: call it within "
            f"`with torch.cuda.device({index}):`, or torch.cuda.set_device({index}) first on this thread"
        )


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is not below ``number`` (1 for 0 and 1)."""
    return 1 << max(number - 1, 0).bit_length()


def cdiv(number: int, divisor: int) -> int:
    """Divide and round up."""
    return -(-number // divisor)


@cache
def _num_sms(index: int) -> int:
    properties: Any = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count


def num_sms(device: torch.device) -> int:
    """Return how many streaming multiprocessors a GPU has; 1 for the CPU, where programs run one by one."""
    if device.type != "cuda":
        return 1
    index = cast("int | None", device.index)
    return _num_sms(torch.cuda.current_device() if index is None else index)
