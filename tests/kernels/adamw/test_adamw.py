"""AdamW over many tensors against torch's own, step by step, and against its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from danaus.kernels import adamw as module
from danaus.kernels import multi_tensor
from danaus.kernels.adamw import adamw_, adamw_reference
from danaus.kernels.optimizers import AdamW

from ..agree import DTYPES
from ..truth import Canaries, assert_close_as_torch, misaligned

SHAPES = [(3, 5), (17,), (), (0, 4), (32, 16), (7, 300)]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs for the larger tensors."""
    monkeypatch.setattr(multi_tensor, "CHUNK", 1024)
    monkeypatch.setattr(module, "CHUNK", 1024)
    multi_tensor._table.cache_clear()


def rows(device: torch.device, dtype: torch.dtype = torch.float32) -> list[list[torch.Tensor]]:
    """Return params, grads, first and second moments."""
    made = [[torch.randn(shape, device=device).to(dtype) for shape in SHAPES] for _ in range(4)]
    made[3] = [v.square() for v in made[3]]
    return made


def copied(lists: list[list[torch.Tensor]], dtype: torch.dtype | None = None) -> list[list[torch.Tensor]]:
    return [[t.to(dtype or t.dtype, copy=True) for t in tensors] for tensors in lists]


@pytest.mark.parametrize("how", [{"foreach": False}, {"fused": True}])
def test_it_walks_with_torchs_own(how: dict[str, Any], device: torch.device) -> None:
    start = [torch.randn(shape, device=device) for shape in SHAPES]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    optimizers = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS, **how)

    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()

    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-7, atol=3e-7)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizers[0].state[a][name], optimizers[1].state[b][name], rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_equals_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    ours = rows(device, dtype)
    wide, same = copied(ours, torch.float64), copied(ours)
    scale = torch.tensor(0.5, device=device)

    adamw_(*ours, step=3, grad_scale=scale, **OPTIONS)
    adamw_reference(*wide, step=3, grad_scale=scale, **OPTIONS)
    adamw_reference(*same, step=3, grad_scale=scale, **OPTIONS)

    for index in (0, 2, 3):
        for got, truth, yardstick in zip(ours[index], wide[index], same[index], strict=True):
            assert_close_as_torch(got, truth, yardstick, grad=True)


def test_dtypes_may_differ_from_tensor_to_tensor(device: torch.device) -> None:
    ours = rows(device)
    ours[0][0], ours[1][1] = ours[0][0].half(), ours[1][1].half()
    ours[2][2], ours[3][2] = ours[2][2].half(), ours[3][2].half()
    expected = copied(ours)

    adamw_(*ours, step=1, **OPTIONS)
    adamw_reference(*expected, step=1, **OPTIONS)

    for got, wanted in zip(ours[0], expected[0], strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_gradient_of_another_layout_is_copied(device: torch.device) -> None:
    p, g = torch.randn(6, 5, device=device).t(), torch.randn(5, 6, device=device)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    expected = p.clone()

    adamw_([p], [g], [m], [v], step=1, **OPTIONS)
    adamw_reference([expected], [g], [torch.zeros_like(p)], [torch.zeros_like(p)], step=1, **OPTIONS)

    torch.testing.assert_close(p, expected)


def test_misaligned_tensors_are_updated_too(device: torch.device) -> None:
    ours = rows(device)
    expected = copied(ours)
    ours = [[misaligned(t) for t in tensors] for tensors in ours]

    adamw_(*ours, step=1, **OPTIONS)
    adamw_reference(*expected, step=1, **OPTIONS)

    for got, wanted in zip(ours[0], expected[0], strict=True):
        torch.testing.assert_close(got, wanted)


def test_it_writes_only_to_its_tensors(device: torch.device) -> None:
    canaries = Canaries()
    ours = [[canaries.around(t) for t in tensors] for tensors in rows(device)]

    adamw_(*ours, step=1, **OPTIONS)

    canaries.check()
    assert not any(t.isnan().any() for tensors in ours for t in tensors)


def test_state_of_torchs_own_can_be_loaded(device: torch.device) -> None:
    p, q = (torch.nn.Parameter(torch.ones(5, device=device)) for _ in range(2))
    theirs, ours = torch.optim.AdamW([p], **OPTIONS), AdamW([q], **OPTIONS)
    p.grad = q.grad = torch.arange(5.0, device=device)
    theirs.step()
    with torch.no_grad():
        q.copy_(p)

    ours.load_state_dict(theirs.state_dict())
    theirs.step()
    ours.step()

    torch.testing.assert_close(q, p)


def test_parameters_without_a_gradient_stay(device: torch.device) -> None:
    p, q = (torch.nn.Parameter(torch.ones(5, device=device)) for _ in range(2))
    p.grad = torch.ones_like(p)
    optimizer = AdamW([p, q], **OPTIONS)

    loss = optimizer.step(p.sum)

    assert loss == 5
    assert torch.equal(q, torch.ones_like(q))
    assert not torch.equal(p, torch.ones_like(p))


@pytest.mark.parametrize("device_type", ["cpu"])
def test_torchs_own_is_the_same(device_type: str) -> None:
    ours = rows(torch.device(device_type))
    expected = copied(ours)

    adamw_(*ours, step=4, impl="torch", **OPTIONS)
    adamw_(*expected, step=4, impl="reference", **OPTIONS)

    for got, wanted in zip(ours[0], expected[0], strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.timeout(60)
def test_torch_may_trace_it(device: torch.device) -> None:
    lists = [[t] for t in (torch.ones(5, device=device) for _ in range(4))]

    torch.library.opcheck(module._adamw_op, (*lists, None, 1, 1e-2, 0.9, 0.99, 1e-8, 0.1))


def test_it_says_what_it_takes(device: torch.device) -> None:
    params, grads, m, v = rows(device)

    with pytest.raises(ValueError, match=r"have lengths \[6, 5, 6, 6\]"):
        adamw_(params, grads[1:], m, v, step=1, lr=1e-2)
    with pytest.raises(ValueError, match="make them alike"):
        adamw_(params, grads[::-1], m, v, step=1, lr=1e-2)
    with pytest.raises(ValueError, match="the first one is 1"):
        adamw_(params, grads, m, v, step=0, lr=1e-2)
    with pytest.raises(ValueError, match="all have to be dense and alike"):
        adamw_([params[0][:, ::2]], [grads[0][:, ::2]], [m[0][:, ::2]], [v[0][:, ::2]], step=1, lr=1e-2)
    with pytest.raises(ValueError, match="out of range"):
        AdamW([torch.nn.Parameter(params[0])], lr=-1.0)
