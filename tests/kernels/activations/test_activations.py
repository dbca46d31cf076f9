"""SwiGLU and GEGLU against their references."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from danaus.kernels import activations as module
from danaus.kernels.activations import geglu, geglu_reference, swiglu, swiglu_reference

from ..agree import DTYPES, assert_agrees
from ..truth import Canaries, misaligned, odd_shapes, poisoned_outputs, strided

PAIRS = {
    "swiglu": (swiglu, swiglu_reference),
    "geglu": (geglu, geglu_reference),
    "geglu-tanh": (partial(geglu, approximate="tanh"), partial(geglu_reference, approximate="tanh")),
}
every = pytest.mark.parametrize("name", PAIRS)


def inputs(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gate and up, with arguments far enough out to saturate."""
    gate = (3 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    return gate, torch.randn(shape, device=device, dtype=dtype, requires_grad=True)


@every
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*odd_shapes(), (3, 1500), (2, 3, 33)])
def test_it_equals_the_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    assert_agrees(*PAIRS[name], inputs(shape, device, dtype), name)


@every
@pytest.mark.parametrize("layout", [strided, misaligned])
def test_any_layout_of_the_rows_will_do(name: str, layout: Any, device: torch.device) -> None:
    gate, up = inputs((5, 37), device)

    assert_agrees(*PAIRS[name], (layout(gate), up), name)


def test_gate_and_up_may_be_halves_of_one_tensor(device: torch.device) -> None:
    packed = torch.randn(4, 2 * 19, device=device, requires_grad=True)

    assert_agrees(lambda x: swiglu(*x.chunk(2, -1)), lambda x: swiglu_reference(*x.chunk(2, -1)), (packed,))


@every
def test_far_out_it_stays_finite(name: str, device: torch.device) -> None:
    ours, reference = PAIRS[name]
    gate = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], device=device, requires_grad=True)

    with poisoned_outputs():
        got = ours(gate, torch.ones_like(gate))
        slope = torch.autograd.grad(got, gate, torch.ones_like(got))[0]

    torch.testing.assert_close(got, reference(gate, torch.ones_like(gate)))
    torch.testing.assert_close(
        slope, torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0], device=device), atol=1e-6, rtol=0
    )


def test_it_writes_only_its_results(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = Canaries()
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: canaries.around(make(*shape, **options)))
    gate, up = inputs((5, 37), device)

    out = swiglu(gate, up)
    torch.autograd.grad(out, (gate, up), out.detach())

    canaries.check()


@every
def test_torchs_own_is_the_same(name: str, device: torch.device) -> None:
    ours, reference = PAIRS[name]
    gate, up = inputs((5, 37), device)

    torch.testing.assert_close(ours(gate, up, impl="torch"), reference(gate, up))


@every
def test_the_references_gradient_is_its_derivative(name: str) -> None:
    gate, up = (t.detach().double().requires_grad_() for t in inputs((3, 5), torch.device("cpu")))

    assert torch.autograd.gradcheck(PAIRS[name][1], (gate, up))


@pytest.mark.timeout(60)
def test_torch_may_trace_it(device: torch.device) -> None:
    torch.library.opcheck(module._gated_op, (*inputs((3, 17), device), module._GELU_TANH))


def test_it_says_what_it_takes(device: torch.device) -> None:
    gate, up = inputs((3, 8), device)

    with pytest.raises(ValueError, match="make them alike"):
        swiglu(gate, up[:, :7])
    with pytest.raises(ValueError, match=r"gate is torch\.float64"):
        swiglu(gate.double(), up.double())
    with pytest.raises(ValueError, match="approximate='fast' is not there"):
        geglu(gate, up, approximate="fast")  # pyright: ignore[reportArgumentType]
