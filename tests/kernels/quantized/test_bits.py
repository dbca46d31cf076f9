"""Packing is exact in both directions and lies as the kernels read it."""

from __future__ import annotations

import pytest
import torch

from danaus.kernels.quantized import pack_bits, unpack_bits
from danaus.kernels.quantized.bits import packed_bytes, unit_codes


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 3, 128), (0, 32), (5, 200)])
def test_codes_survive_packing(bits: int, shape: tuple[int, ...], device: torch.device) -> None:
    codes = torch.randint(2**bits, shape, device=device, dtype=torch.uint8)

    packed = pack_bits(codes, bits)

    assert packed.shape == (*shape[:-1], packed_bytes(shape[-1], bits))
    assert torch.equal(unpack_bits(packed, bits, shape[-1]), codes)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_bytes_survive_unpacking(bits: int, device: torch.device) -> None:
    packed = torch.randint(256, (3, 48), device=device, dtype=torch.uint8)

    codes = unpack_bits(packed, bits, 48 * 8 // bits)

    assert torch.equal(pack_bits(codes, bits), packed)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_code_lies_where_the_layout_says(bits: int) -> None:
    for place in range(2 * unit_codes(bits)):
        codes = torch.zeros(2 * unit_codes(bits), dtype=torch.uint8)
        codes[place] = 1
        unit, inside = divmod(place, unit_codes(bits))
        plane, byte = divmod(inside, 16)

        packed = pack_bits(codes, bits)

        assert packed[16 * unit + byte] == 1 << (bits * plane)
        assert packed.count_nonzero() == 1


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="codes from 0 to 16, 4 bits hold 0 to 15"):
        pack_bits(torch.arange(17), 4)
    with pytest.raises(ValueError, match="bits=3"):
        pack_bits(torch.zeros(3), 3)
    with pytest.raises(ValueError, match=r"40 codes of 4 bits take uint8 \[..., 32\]"):
        unpack_bits(torch.zeros(16, dtype=torch.uint8), 4, 40)
