"""One launch over many tensors: a table of addresses, and for each program the tensor that it works on.

Tensors that are updated together (a parameter, its gradient, its optimizer state) form a row of the table. A program
takes CHUNK consecutive elements of one row. The table is made on the host and kept while the addresses stay, which
they do from step to step.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from .launch import cdiv, tl, triton

if TYPE_CHECKING:
    from collections.abc import Sequence

CHUNK = 16_384
"""Elements of a program: long enough that finding its tensor costs nothing, and whole blocks of 8-bit states."""

VECTOR = 16
"""What addresses in bytes and sizes in elements are multiples of where a thread may load 16 bytes at once."""

TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Where the tensors of one launch are."""

    addresses: torch.Tensor
    """int64 ``[tensors, columns]``."""
    sizes: torch.Tensor
    """int64 ``[tensors]``, in elements."""
    first_programs: torch.Tensor
    """int32 ``[tensors]``: the program that takes a tensor's first chunk."""
    tensor_of: torch.Tensor
    """int32 ``[programs]``."""
    num_programs: int


def table_of(rows: Sequence[Sequence[torch.Tensor]]) -> Table:
    """Return the table for ``rows`` of tensors, all on one device; the first of a row has its number of elements."""
    addresses = tuple(tuple(tensor.data_ptr() for tensor in row) for row in rows)
    return _table(addresses, tuple(row[0].numel() for row in rows), rows[0][0].device)


@lru_cache(maxsize=64)
def _table(addresses: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], device: torch.device) -> Table:
    chunks = torch.tensor([cdiv(size, CHUNK) for size in sizes], dtype=torch.int64)
    first_programs = chunks.cumsum(0) - chunks
    tensor_of = torch.repeat_interleave(torch.arange(len(sizes)), chunks)
    return Table(
        addresses=torch.tensor(addresses, dtype=torch.int64).to(device),
        sizes=torch.tensor(sizes, dtype=torch.int64).to(device),
        first_programs=first_programs.int().to(device),
        tensor_of=tensor_of.int().to(device),
        num_programs=len(tensor_of),
    )


@triton.jit
def pointer_at(addresses_ptr, column: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the address in a column of a row of the table as a pointer to DTYPE."""
    pointer = tl.load(addresses_ptr + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def is_aligned(row: Sequence[torch.Tensor]) -> bool:
    """Whether the tensors of a row can be read 16 bytes at a time to their end."""
    return row[0].numel() % VECTOR == 0 and all(tensor.data_ptr() % VECTOR == 0 for tensor in row)


def is_dense(x: torch.Tensor) -> bool:
    """Whether the elements of ``x`` fill one stretch of memory, in whatever order of its dims."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def laid_out_like(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with the strides of ``other``, as a copy where it has others."""
    if x.stride() == other.stride():
        return x
    return torch.empty_like(other, dtype=x.dtype).copy_(x)
