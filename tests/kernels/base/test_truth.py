"""The tests' own yardstick can tell right from wrong."""

from __future__ import annotations

import pytest
import torch

from ..truth import Canaries, assert_close_as_torch, misaligned, poisoned, poisoned_outputs, strided, ulp


def test_twice_the_error_of_torch_passes_and_more_does_not() -> None:
    truth = torch.full((4,), 1000.0, dtype=torch.float64)
    rounded = truth.half() + 4

    assert_close_as_torch(truth.half() + 8, truth, rounded)
    with pytest.raises(AssertionError, match="error 9, allowed 8"):
        assert_close_as_torch(truth.half() + 9, truth, rounded)
    assert_close_as_torch(truth.half() + 12, truth, rounded, grad=True)


def test_one_unit_in_the_last_place_passes_where_torch_is_exact() -> None:
    truth = torch.full((4,), 1000.0, dtype=torch.float64)

    assert_close_as_torch(truth.half() + 0.5, truth, truth.half())
    with pytest.raises(AssertionError, match=r"allowed 0\.5"):
        assert_close_as_torch(truth.half() + 1, truth, truth.half())


def test_what_was_not_written_is_an_error() -> None:
    truth = torch.ones(3, dtype=torch.float64)

    with pytest.raises(AssertionError, match="error inf"):
        assert_close_as_torch(poisoned((3,)), truth, truth.float())


def test_another_dtype_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"float32, expected torch\.float16"):
        assert_close_as_torch(torch.ones(1), torch.ones(1).double(), torch.ones(1).half())


@pytest.mark.parametrize(("value", "expected"), [(1.0, 2**-10), (1000.0, 0.5), (0.0, 2**-24)])
def test_ulp_of_half_precision(value: float, expected: float) -> None:
    assert ulp(value, torch.float16) == expected


def test_empty_tensors_are_poisoned_within_the_block_only() -> None:
    with poisoned_outputs():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2, dtype=torch.int8)).tolist() == [127, 127]
        assert torch.ones(1).new_empty(2).isnan().all()
    assert not torch.zeros(3).isnan().any()


def test_changed_layouts_keep_the_values() -> None:
    x = torch.randn(3, 5)

    assert torch.equal(strided(x), x)
    assert not strided(x).is_contiguous()
    assert torch.equal(misaligned(x), x)
    assert misaligned(x).storage_offset() == 1


def test_a_write_beside_a_buffer_is_noticed() -> None:
    canaries = Canaries()
    view = canaries.around(torch.ones(3, 4))

    view.fill_(2.0)
    canaries.check()
    view.as_strided((1,), (1,), view.storage_offset() + 12).fill_(0.0)
    with pytest.raises(AssertionError, match="canary"):
        canaries.check()
