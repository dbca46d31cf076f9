"""Packs codes of 1, 2 or 4 bits into bytes, in the one layout that every kernel of this folder reads.

Shapes:  K = codes of a row, B = bytes of a row, P = 8 / bits = codes of a byte ("planes").
Layout:  16 bytes hold a unit of 16 * P codes. Code ``p * 16 + j`` of a unit lies in byte j of it, at bits
         ``p * bits`` and up. So a thread's widest load (16 bytes) is whole units, one shift and one mask give a plane,
         and what a plane is multiplied with are 16 neighbours: nothing is shuffled between threads.
         A row is padded to whole units with code 0.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ..launch import cdiv

UNIT_BYTES = 16

_BITS = (1, 2, 4)


def unit_codes(bits: int) -> int:
    """Return how many codes a unit of 16 bytes holds."""
    return UNIT_BYTES * 8 // bits


def packed_bytes(num_codes: int, bits: int) -> int:
    """Return how many bytes a row of ``num_codes`` takes."""
    return UNIT_BYTES * cdiv(num_codes, unit_codes(bits))


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack ``codes[..., K]`` (integers below ``2**bits``) into ``[..., B]`` uint8.

    Raises:
        ValueError: ``bits`` is none of 1, 2, 4, or a code does not fit.
    """
    _check_bits(bits)
    if codes.dtype != torch.bool and codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise ValueError(
            f"pack_bits: codes from {int(codes.min())} to {int(codes.max())}, {bits} bits hold 0 to {2**bits - 1}: "
            f"shift or clamp them first"
        )
    width, planes = codes.shape[-1], 8 // bits
    padded = functional.pad(codes.to(torch.uint8), (0, -width % unit_codes(bits)))
    units = padded.reshape(*codes.shape[:-1], padded.shape[-1] // unit_codes(bits), planes, UNIT_BYTES)
    packed = units[..., 0, :].clone()
    for plane in range(1, planes):
        packed |= units[..., plane, :] << (bits * plane)
    return packed.flatten(-2)


def unpack_bits(packed: torch.Tensor, bits: int, num_codes: int) -> torch.Tensor:
    """Return the ``[..., K]`` uint8 codes that :func:`pack_bits` packed.

    Raises:
        ValueError: ``packed`` is not uint8 or does not hold ``num_codes`` a row.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_bytes(num_codes, bits):
        raise ValueError(
            f"unpack_bits: {num_codes} codes of {bits} bits take uint8 [..., {packed_bytes(num_codes, bits)}], "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    units = packed.unflatten(-1, (packed.shape[-1] // UNIT_BYTES, UNIT_BYTES))
    planes = [(units >> (bits * plane)) & (2**bits - 1) for plane in range(8 // bits)]
    return torch.stack(planes, -2).flatten(-3)[..., :num_codes]


def _check_bits(bits: int) -> None:
    if bits not in _BITS:
        raise ValueError(f"bits={bits}: codes of 1, 2 or 4 bits can be packed")
