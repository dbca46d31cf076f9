"""The second process compiles, and says what does not fit."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from danaus.kernels.rmsnorm import _rmsnorm_kernel

from ..aot import Build, Compiler, compile_sm90

if TYPE_CHECKING:
    from collections.abc import Iterator

POINTERS = ("x_ptr", "residual_ptr", "w_ptr", "y_ptr", "h_ptr", "rstd_ptr")
NUMBERS = {"x_stride": "i32:16", "residual_stride": "i32:16", "num_rows": "i32", "num_cols": "i32:16", "eps": "fp32"}
BUILD = Build(
    name="rmsnorm",
    kernel=_rmsnorm_kernel,
    signature={**dict.fromkeys(POINTERS, "*bf16"), **NUMBERS},
    constexprs={"HAS_RESIDUAL": True, "ROWS": 1, "BLOCK": 1024},
)


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler() as compiler:
        yield compiler


@pytest.mark.timeout(90)
def test_a_kernel_that_fits_tells_what_it_takes(compiler: Compiler) -> None:
    compiled = compiler.check(BUILD)

    assert compiled.registers > 8
    assert (compiled.stack, compiled.local, compiled.wgmma) == (0, 0, False)
    assert ".target sm_90" in compiled.ptx


@pytest.mark.timeout(90)
def test_one_that_spills_is_named(compiler: Compiler) -> None:
    greedy = dataclasses.replace(BUILD, constexprs={**BUILD.constexprs, "BLOCK": 65536}, num_warps=4)

    with pytest.raises(AssertionError, match=r"rmsnorm: .* bytes per thread spilled"):
        compiler.check(greedy)


@pytest.mark.timeout(90)
def test_one_without_the_expected_matrix_instructions_is_named(compiler: Compiler) -> None:
    with pytest.raises(AssertionError, match="no wgmma in it"):
        compiler.check(dataclasses.replace(BUILD, wgmma=True))


@pytest.mark.timeout(90)
def test_a_signature_that_leaves_out_a_parameter_says_which() -> None:
    with pytest.raises(RuntimeError, match=r"missing \['eps'\], unknown \['epsilon'\]"):
        compile_sm90(
            _rmsnorm_kernel,
            {**dict.fromkeys(POINTERS, "*bf16"), **{k: v for k, v in NUMBERS.items() if k != "eps"}, "epsilon": "fp32"},
            BUILD.constexprs,
        )
