"""Tensors to bytes and buffers, and back."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from danaus.runtime.messages import buffers
from danaus.runtime.messages.payload import IN_BAND_BYTES, dump, is_borrowing, load

if TYPE_CHECKING:
    from collections.abc import Callable

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

LARGE = IN_BAND_BYTES + 1


def sent(value: Any, *, borrow: bool = False) -> Any:
    """Pass ``value`` through bytes and read-only buffers, as a link does."""
    payload = dump(value)
    return load(payload.body, [memoryview(bytes(view)) for view in payload.buffers], borrow=borrow)


class Broken:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[int, int]]:
        return divmod, (1, 0)


TENSOR_DTYPES = [
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2"),
]


def assert_same_tensor(arrived: Any, tensor: Any) -> None:
    assert (type(arrived), arrived.dtype, arrived.shape) == (type(tensor), tensor.dtype, tensor.shape)
    expected = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    assert arrived.detach().contiguous().reshape(-1).view(torch.uint8).equal(expected)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("borrow", [False, True])
@pytest.mark.parametrize("size", [0, 3, LARGE])
@pytest.mark.parametrize("name", TENSOR_DTYPES)
def test_tensors_of_every_type_arrive_equal(name: str, size: int, borrow: bool) -> None:
    dtype = getattr(torch, name)
    tensor = (torch.arange(size * dtype.itemsize) % 2).to(torch.uint8).view(dtype).reshape(1, size)

    assert_same_tensor(sent(tensor, borrow=borrow), tensor)


def test_tensors_of_every_layout_arrive_equal_and_contiguous() -> None:
    cube = torch.arange(24 * 500.0).reshape(2, 3, 4, 500)
    views = [
        torch.tensor(3.5),
        cube.permute(2, 0, 3, 1),
        cube[:, ::2, 1, 3::7],
        torch.arange(700).expand(30, 700),
        torch.zeros(3, 0, 5),
        cube.to(memory_format=torch.channels_last),
    ]

    for tensor in views:
        arrived = sent(tensor)
        assert_same_tensor(arrived, tensor)
        assert arrived.is_contiguous()


def test_conjugated_and_negated_views_arrive_equal() -> None:
    numbers = torch.view_as_complex(torch.arange(8.0).reshape(4, 2)).conj()

    assert sent(numbers).equal(numbers)
    assert sent(numbers.imag).equal(numbers.imag)


def test_a_received_tensor_is_private_and_can_be_written_to() -> None:
    for size in (3, LARGE, 1 << 20):
        payload = dump(torch.ones(size))
        buffers = [memoryview(bytes(view)) for view in payload.buffers]

        arrived = load(payload.body, buffers)
        arrived.zero_()

        assert load(payload.body, buffers).sum().item() == size


def test_a_borrowed_tensor_stands_on_the_received_buffer() -> None:
    payload = dump(torch.arange(LARGE))
    buffer = bytes(payload.buffers[0])

    arrived = load(payload.body, [buffer], borrow=True)

    assert arrived.data_ptr() == np.frombuffer(buffer, "u1").ctypes.data


def test_borrowing_ends_with_the_load_even_when_it_raises() -> None:
    payload = dump((torch.zeros(LARGE), Broken()))

    with pytest.raises(ZeroDivisionError):
        load(payload.body, [bytes(view) for view in payload.buffers], borrow=True)

    assert not is_borrowing()


def test_loading_a_borrowed_tensor_leaves_the_warning_filters_alone() -> None:
    before = list(warnings.filters)
    sent(torch.zeros(LARGE), borrow=True)

    assert list(warnings.filters) == before


def test_leaves_keep_requires_grad_and_values_of_a_graph_arrive_detached() -> None:
    leaf = torch.ones(3, requires_grad=True)

    arrived, value = sent((leaf, leaf * 2))

    assert arrived.requires_grad
    assert arrived.is_leaf
    assert not value.requires_grad
    assert value.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("requires_grad", [True, False])
def test_parameters_arrive_as_parameters(requires_grad: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3), requires_grad=requires_grad)

    arrived = sent(parameter)

    assert_same_tensor(arrived, parameter)
    assert arrived.requires_grad is requires_grad


def test_a_module_arrives_with_its_weights_outside_of_the_pickle() -> None:
    module = torch.nn.Linear(100, 100)
    payload = dump(module)

    arrived = sent(module)

    assert [view.nbytes for view in payload.buffers] == [40_000]
    assert_same_tensor(arrived.weight, module.weight)
    assert arrived.weight.requires_grad


class Tagged(torch.Tensor):
    pass


def test_tensor_subclasses_take_torchs_own_way_and_keep_their_class() -> None:
    tensor = torch.arange(LARGE).as_subclass(Tagged)

    assert_same_tensor(sent(tensor), tensor)


def test_sparse_and_meta_tensors_take_torchs_own_way() -> None:
    sparse, meta = sent((torch.eye(3).to_sparse(), torch.empty(3, device="meta")))

    assert sparse.to_dense().equal(torch.eye(3))
    assert (meta.device.type, meta.shape) == ("meta", (3,))


def test_the_memory_of_a_large_tensor_goes_back_when_its_last_view_is_gone() -> None:
    size_bytes = 1 << 21
    buffers._free[size_bytes].clear()
    arrived = sent(torch.zeros(size_bytes, dtype=torch.uint8))
    view = arrived[5:9]
    gone = weakref.ref(arrived)
    del arrived
    gc.collect()
    assert gone() is None
    assert len(buffers._free[size_bytes]) == 0

    del view
    gc.collect()
    assert len(buffers._free[size_bytes]) == 1

    kept = sent(torch.ones(size_bytes, dtype=torch.uint8))
    assert len(buffers._free[size_bytes]) == 0
    assert kept.sum().item() == size_bytes
