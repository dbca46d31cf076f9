"""Matrix products with quantized weights, from 8 bits to 1; packing and unpacking beside each.

A weight is quantized once with ``*_quantize``, which returns a named tuple of tensors, and used with ``*_linear``.

    bits.py         the layout in which codes of 1, 2 and 4 bits are packed
    int8.py         W8A8: activations by token, weights by channel
    outliers.py     LLM.int8: W8A8 with the outlier columns in 16 bit
    int4.py         W4A16 in groups, symmetric or with a zero point
    nf4.py          NF4 with double quantization
    ternary.py      W2A8: BitNet b1.58
    binary.py       one bit: BWN, and XNOR with bits counted
    weight_only.py  launches the kernels that int4, nf4 and BWN share
"""

from .binary import (
    BinaryRows,
    binary_dequantize,
    binary_linear,
    binary_quantize,
    binary_signs,
    xnor_linear,
    xnor_matmul,
)
from .bits import pack_bits, unpack_bits
from .int4 import Int4Weight, int4_dequantize, int4_linear, int4_quantize
from .int8 import Int8Rows, int8_dequantize, int8_linear, int8_matmul, int8_quantize
from .nf4 import Nf4Weight, nf4_dequantize, nf4_linear, nf4_quantize
from .outliers import llm_int8_linear
from .ternary import (
    TernaryWeight,
    ternary_dequantize,
    ternary_linear,
    ternary_matmul,
    ternary_quantize,
    ternary_unpack,
)

__all__ = [
    "BinaryRows",
    "Int4Weight",
    "Int8Rows",
    "Nf4Weight",
    "TernaryWeight",
    "binary_dequantize",
    "binary_linear",
    "binary_quantize",
    "binary_signs",
    "int4_dequantize",
    "int4_linear",
    "int4_quantize",
    "int8_dequantize",
    "int8_linear",
    "int8_matmul",
    "int8_quantize",
    "llm_int8_linear",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "pack_bits",
    "ternary_dequantize",
    "ternary_linear",
    "ternary_matmul",
    "ternary_quantize",
    "ternary_unpack",
    "unpack_bits",
    "xnor_linear",
    "xnor_matmul",
]
