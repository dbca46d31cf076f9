"""How tensors cross a process boundary; the only file of the message path that knows torch.

Values and shapes arrive as sent (a strided tensor arrives contiguous), leaves keep ``requires_grad``, values of a
graph arrive detached. CUDA tensors travel through host memory and are rebuilt on the device of the same index.
"""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import torch

from . import payload
from .buffers import warm

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether this file carries ``tensor``; subclasses, sparse, quantized and fake ones take torch's own pickling."""
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and tensor.device.type in {"cpu", "cuda"}
        and not (tensor.is_conj() or tensor.is_neg())
    )


def reduce_tensor(tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    """Pickle ``tensor`` as a buffer of its bytes beside dtype, shape and device."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    device = None if tensor.device.type == "cpu" else str(tensor.device)
    buffer = pickle.PickleBuffer(flat.numpy().data.toreadonly() if flat.numel() else b"")
    is_parameter = type(tensor) is torch.nn.Parameter
    return _rebuild, (
        buffer,
        tensor.dtype,
        tuple(tensor.shape),
        device,
        tensor.requires_grad and tensor.is_leaf,
        is_parameter,
    )


def _rebuild(
    buffer: Any,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: str | None,
    requires_grad: bool,
    is_parameter: bool,
) -> torch.Tensor:
    view = memoryview(buffer)
    if not view.nbytes:
        tensor = torch.empty(shape, dtype=dtype)
    elif device is not None or payload.is_borrowing():
        tensor = _on_buffer(view, dtype).reshape(shape)
    else:
        private = _on_buffer(warm(view.nbytes), torch.uint8).copy_(_on_buffer(view, torch.uint8))
        tensor = private.view(dtype).reshape(shape)
    if device is not None:
        tensor = tensor.to(device if torch.cuda.is_available() else "cpu", copy=True)
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)
    return tensor.requires_grad_(requires_grad) if requires_grad else tensor


def _on_buffer(buffer: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=dtype)


with warnings.catch_warnings():
    # Torch says once per process that it knows no read-only tensors, which concerns nobody here: such a view is copied
    # at once, or borrowed by an endpoint that promised not to write. Filters are not safe to change in each load.
    warnings.simplefilter("ignore")
    _on_buffer(b"0", torch.uint8)
