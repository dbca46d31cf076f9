"""The counting sort against a stable sort, to the bit, and both against what they promise."""

from __future__ import annotations

import pytest
import torch

from danaus.kernels.moe import order as module
from danaus.kernels.moe import sort_by_expert, sort_by_expert_reference
from danaus.kernels.tuning import using

from ..truth import Canaries, poisoned_outputs


@pytest.mark.parametrize("capacity", [None, 1, 3, 1000])
@pytest.mark.parametrize(("tokens", "k", "experts"), [(0, 2, 3), (1, 1, 1), (13, 3, 5), (40, 2, 64)])
def test_it_equals_the_reference(tokens: int, k: int, experts: int, capacity: int | None, device: torch.device) -> None:
    # -1 and X are experts of nobody.
    chosen = torch.randint(-1, experts + 1, (tokens, k), device=device)

    with poisoned_outputs(), using("moe_sort", {"BLOCK": 16}):
        order = sort_by_expert(chosen, experts, capacity=capacity)
    expected = sort_by_expert_reference(chosen, experts, capacity=capacity)

    for got, right in zip(order, expected, strict=True):
        assert got.dtype is right.dtype is torch.int32
        assert torch.equal(got, right)


@pytest.mark.parametrize("impl", ["reference", "triton", "torch"])
@pytest.mark.parametrize("capacity", [None, 4])
def test_each_row_holds_a_choice_of_its_expert_and_first_choices_come_first(
    impl: str, capacity: int | None, device: torch.device
) -> None:
    chosen = torch.randint(0, 4, (20, 2), device=device)

    order = sort_by_expert(chosen, 4, capacity=capacity, impl=impl)  # pyright: ignore[reportArgumentType]

    source, place, offsets = (part.tolist() for part in order)
    for expert in range(4):
        rows = [(k, t) for k in range(2) for t in range(20) if chosen[t, k] == expert]
        kept = rows[:capacity]
        first, end = offsets[expert : expert + 2]
        assert [source[row] for row in range(first, end)] == [t * 2 + k for k, t in kept]
        assert [place[t][k] for k, t in rows] == [*range(first, end)] + [-1] * (len(rows) - len(kept))
    assert set(source[offsets[-1] :]) <= {-1}


def test_a_stretch_may_be_the_default_one(device: torch.device) -> None:
    chosen = torch.randint(0, 8, (70, 2), device=device, dtype=torch.int32).t().contiguous().t()

    order = sort_by_expert(chosen, 8)

    assert all(torch.equal(a, b) for a, b in zip(order, sort_by_expert_reference(chosen, 8), strict=True))


def test_a_number_that_does_not_fit_32_bits_is_no_expert(device: torch.device) -> None:
    order = sort_by_expert(torch.tensor([[2**32], [1]], device=device), 2)

    assert order.place.tolist() == [[-1], [0]]


def test_it_writes_only_its_results(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = Canaries()
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: canaries.around(make(*shape, **options)))

    sort_by_expert(torch.randint(-1, 5, (13, 3), device=device), 5, capacity=4)

    canaries.check()


@pytest.mark.timeout(60)
def test_torch_may_trace_it(device: torch.device) -> None:
    chosen = torch.randint(0, 3, (4, 2), device=device)

    torch.library.opcheck(module._sort_op, (chosen, 3, None))
    torch.library.opcheck(module._sort_op, (chosen, 3, 2))


def test_it_says_what_it_takes(device: torch.device) -> None:
    chosen = torch.zeros(3, 2, device=device, dtype=torch.int64)

    with pytest.raises(ValueError, match="int32 or int64"):
        sort_by_expert(chosen.float(), 2)
    with pytest.raises(ValueError, match="0 experts"):
        sort_by_expert(chosen, 0)
    with pytest.raises(ValueError, match="capacity 0 drops everything"):
        sort_by_expert(chosen, 2, capacity=0)
