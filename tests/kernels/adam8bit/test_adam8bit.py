"""8-bit states: the map, codes to the last bit, and training that ends where fp32 states end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from danaus.kernels import adam8bit as module
from danaus.kernels.adam8bit import (
    BLOCK_SIZE,
    State,
    adam8bit_,
    dequantize_reference,
    dynamic_map,
    new_state,
    quantize_reference,
)
from danaus.kernels.optimizers import AdamW, AdamW8bit

from ..agree import DTYPES
from ..truth import Canaries, misaligned

SHAPES = [(300,), (2, 256), (17, 65), (), (0, 3)]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs for the larger tensors."""
    from danaus.kernels import multi_tensor

    monkeypatch.setattr(multi_tensor, "CHUNK", 512)
    monkeypatch.setattr(module, "CHUNK", 512)
    monkeypatch.setattr(module, "_CONFIG", {"BLOCKS": 2, "num_warps": 4})
    multi_tensor._table.cache_clear()


def start(
    device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], list[State], list[State]]:
    params = [torch.randn(shape, device=device).to(dtype) for shape in SHAPES]
    return params, [new_state(p, signed=True) for p in params], [new_state(p, signed=False) for p in params]


def copied(states: list[State]) -> list[State]:
    return [(codes.clone(), scales.clone()) for codes, scales in states]


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_equal_the_references(dtype: torch.dtype, device: torch.device) -> None:
    params, m, v = start(device, dtype)
    expected, m_expected, v_expected = [p.clone() for p in params], copied(m), copied(v)

    for step in (1, 2, 3):
        grads = [torch.randn_like(p) for p in params]
        adam8bit_(params, grads, m, v, step=step, **OPTIONS)
        adam8bit_(expected, grads, m_expected, v_expected, step=step, impl="reference", **OPTIONS)

    for got, wanted in zip(params, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3 if dtype is not torch.float32 else 3e-7, atol=3e-7)
    for got, wanted in zip([*m, *v], [*m_expected, *v_expected], strict=True):
        # A value on the edge between two codes may fall to either side.
        assert (got[0].int() - wanted[0].int()).abs().max() <= 1 if got[0].numel() else True
        assert (got[0] != wanted[0]).sum() <= got[0].numel() // 200
        torch.testing.assert_close(got[1], wanted[1], rtol=1e-6, atol=0)


def test_misaligned_tensors_are_updated_too(device: torch.device) -> None:
    params, m, v = start(device)
    grads = [torch.randn_like(p) for p in params]
    expected, m_expected, v_expected = [p.clone() for p in params], copied(m), copied(v)
    params = [misaligned(p) for p in params]

    adam8bit_(params, grads, m, v, step=1, **OPTIONS)
    adam8bit_(expected, grads, m_expected, v_expected, step=1, impl="reference", **OPTIONS)

    for got, wanted in zip(params, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_it_writes_only_to_its_tensors(device: torch.device) -> None:
    canaries = Canaries()
    params, m, v = start(device)
    params = [canaries.around(p) for p in params]
    m, v = ([(canaries.around(codes), canaries.around(scales)) for codes, scales in states] for states in (m, v))

    adam8bit_(params, [torch.ones_like(p) for p in params], m, v, step=1, **OPTIONS)

    canaries.check()


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_has_256_values_in_order_and_its_ends(signed: bool) -> None:
    values = dynamic_map(signed=signed)

    assert len(values.unique()) == 256
    assert torch.equal(values, values.sort().values)
    assert 0.0 in values
    assert values[-1] == 1.0
    # The smallest fraction of the smallest power of ten: the middle of [0.1, 1] and of its lower half.
    assert values[values > 0][0] == pytest.approx(0.55e-6 if signed else 0.325e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_every_entry_of_the_map_is_its_own_code(signed: bool) -> None:
    values = dynamic_map(signed=signed)

    codes, scales = quantize_reference(values, signed=signed)

    assert scales.tolist() == [1.0]
    assert torch.equal(codes, torch.arange(256, dtype=torch.uint8))
    assert torch.equal(dequantize_reference((codes, scales), signed=signed), values)


def test_an_outlier_spoils_only_its_block() -> None:
    x = torch.randn(4 * BLOCK_SIZE)
    x[0] = 1e6

    error = (dequantize_reference(quantize_reference(x, signed=True), signed=True) - x).abs()

    assert error[1:BLOCK_SIZE].max() > 0.5
    assert error[BLOCK_SIZE:].max() < 0.1


def test_a_positive_second_moment_stays_positive() -> None:
    x = torch.tensor([1.0, 1e-9, 0.0])

    codes, scales = quantize_reference(x, signed=False)

    assert codes.tolist() == [255, 1, 0]
    assert (dequantize_reference((codes, scales), signed=False) > 0).tolist() == [True, True, False]


def test_zeros_stay_zeros(device: torch.device) -> None:
    p = torch.zeros(BLOCK_SIZE + 3, device=device)
    m, v = new_state(p, signed=True), new_state(p, signed=False)

    adam8bit_([p], [torch.zeros_like(p)], [m], [v], step=1, **OPTIONS)

    assert not p.any()
    assert not dequantize_reference(m, signed=True).any()
    assert not dequantize_reference(v, signed=False).any()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_training_ends_where_fp32_states_end(impl: Any, device: torch.device) -> None:
    target = torch.randn(4, 256, device=device)
    ours, theirs = (torch.nn.Parameter(torch.zeros(4, 256, device=device)) for _ in range(2))
    optimizers = (
        AdamW8bit([ours], lr=5e-2, weight_decay=0.0, min_8bit_size=1, impl=impl),
        AdamW([theirs], lr=5e-2, weight_decay=0.0, impl="reference"),
    )

    def losses() -> list[torch.Tensor]:
        return [(p - target).square().mean() for p in (ours, theirs)]

    for _ in range(80 if impl == "reference" else 20):
        for optimizer, loss in zip(optimizers, losses(), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    ended = [loss.item() for loss in losses()]
    assert ended[1] < 0.5
    assert ended[0] == pytest.approx(ended[1], rel=0.05, abs=1e-3)


def test_small_tensors_keep_fp32_states(device: torch.device) -> None:
    large, small = (torch.nn.Parameter(torch.ones(n, device=device)) for n in (512, 511))
    large.grad, small.grad = torch.ones_like(large), torch.ones_like(small)
    optimizer = AdamW8bit([large, small], min_8bit_size=512, **OPTIONS)

    optimizer.step()

    assert optimizer.state[large]["exp_avg_codes"].dtype is torch.uint8
    assert optimizer.state[small]["exp_avg"].dtype is torch.float32


def test_its_state_is_saved_and_loaded_bit_for_bit(device: torch.device) -> None:
    p = torch.nn.Parameter(torch.randn(600, device=device, dtype=torch.float16))
    p.grad = torch.randn_like(p)
    optimizer, loaded = (AdamW8bit([p], min_8bit_size=1, **OPTIONS) for _ in range(2))
    optimizer.step()

    loaded.load_state_dict(optimizer.state_dict())

    for name, value in optimizer.state[p].items():
        assert loaded.state[p][name].dtype == value.dtype
        assert torch.equal(loaded.state[p][name], value), name


@pytest.mark.timeout(60)
def test_torch_may_trace_it(device: torch.device) -> None:
    p, g = torch.ones(5, device=device), torch.ones(5, device=device)
    (m, m_scales), (v, v_scales) = new_state(p, signed=True), new_state(p, signed=False)
    lists = [[t] for t in (p, g, m, v, m_scales, v_scales)]

    torch.library.opcheck(module._adam8bit_op, (*lists, 1, 1e-2, 0.9, 0.99, 1e-8, 0.1))


def test_it_says_what_it_takes(device: torch.device) -> None:
    params, m, v = start(device)

    with pytest.raises(ValueError, match=r"have lengths \[5, 4, 5, 5\]"):
        adam8bit_(params, params[1:], m, v, step=1, lr=1e-2)
    with pytest.raises(ValueError, match="make it with new_state"):
        adam8bit_(params, params, m[::-1], v, step=1, lr=1e-2)
    with pytest.raises(ValueError, match="the first one is 1"):
        adam8bit_(params, params, m, v, step=0, lr=1e-2)
