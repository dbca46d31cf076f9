"""Values to bytes and buffers, and back: what arrives equals what was sent, and belongs to the receiver."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from danaus.runtime.messages.payload import IN_BAND_BYTES, Payload, dump, dump_plain, is_plain_tuple, load

if TYPE_CHECKING:
    from collections.abc import Callable

# A busy machine is no reason to fail.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

LARGE = IN_BAND_BYTES + 1


def sent(value: Any) -> Any:
    """Pass ``value`` through bytes and read-only buffers, as a link does."""
    payload = dump(value)
    return load(payload.body, [memoryview(bytes(view)) for view in payload.buffers])


# plain values

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=20)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=20)
        | st.tuples(inner, inner)
    ),
    max_leaves=40,
)


@UNHURRIED
@given(plain)
def test_plain_values_arrive_equal_and_of_the_same_type(value: Any) -> None:
    arrived = sent(value)

    assert arrived == value
    assert type(arrived) is type(value)


@UNHURRIED
@given(plain)
def test_plain_values_need_no_cloudpickle_to_be_loaded(value: Any) -> None:
    assert pickle.loads(dump(value).body) == value


@dataclass
class Settings:
    rate: float
    names: list[str]


class Plain(int):
    """A subclass of a plain type is not plain."""

    extra: ClassVar[str] = "kept"


@pytest.mark.parametrize(
    "value",
    [Settings(0.5, ["a"]), {1, 2}, frozenset({"x"}), range(3), 3 + 4j, Plain(3), [Plain(3)], {"k": Plain(3)}, ...],
    ids=repr,
)
def test_other_objects_arrive_as_what_they_were(value: Any) -> None:
    arrived = sent(value)

    assert arrived == value
    assert type(arrived) is type(value)


def test_a_plain_subclass_inside_containers_keeps_its_class() -> None:
    assert type(sent([[{"k": (Plain(3),)}]])[0][0]["k"][0]) is Plain


def test_a_list_that_contains_itself_arrives_so() -> None:
    loop: list[Any] = []
    loop.append(loop)

    arrived = sent(loop)

    assert arrived[0] is arrived


def test_an_object_that_occurs_twice_is_one_object_on_arrival() -> None:
    array, settings_ = np.arange(LARGE), Settings(1.0, [])

    first, second, third, fourth = sent((array, array, settings_, settings_))

    assert first is second
    assert third is fourth
    assert len(dump((array, array)).buffers) == 1


@pytest.mark.parametrize("values", [(), (1, "a", None, 2.5, b"x", True, 1j)])
def test_a_tuple_of_numbers_and_text_is_plain(values: tuple[Any, ...]) -> None:
    assert is_plain_tuple(values)
    assert load(dump_plain(values)) == values


@pytest.mark.parametrize("value", [[1], (1,), Plain(1), np.float64(1.0), len])
def test_a_tuple_of_anything_else_is_not(value: Any) -> None:
    assert not is_plain_tuple((1, value))


# code


def test_lambdas_and_closures_arrive() -> None:
    offset = 7

    assert sent(lambda value: value + offset)(1) == 8


def test_local_classes_arrive_with_their_instances() -> None:
    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

        def double(self) -> int:
            return 2 * self.value

    assert sent(Local(21)).double() == 42


def test_a_local_subclass_of_a_plain_type_arrives() -> None:
    class Meters(int):
        pass

    assert type(sent(Meters(3))).__name__ == type(sent({"x": [Meters(3)]})["x"][0]).__name__ == "Meters"


def test_functions_and_classes_of_main_are_loaded_by_a_process_that_has_not_their_file() -> None:
    script = """
import sys
from danaus.runtime.messages.payload import dump
class Point:
    def __init__(self, x): self.x = x
def shift(point): return Point(point.x + 1)
sys.stdout.buffer.write(dump((shift, Point(4))).body)
"""
    body = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=20).stdout

    shift, point = load(body)

    assert shift(point).x == 5


def test_what_cannot_be_pickled_raises_at_dump() -> None:
    with pytest.raises(TypeError, match="lock"):
        dump(threading.Lock())


def test_what_raises_while_it_is_loaded_raises_at_load() -> None:
    payload = dump(Broken())

    with pytest.raises(ZeroDivisionError):
        load(payload.body)


class Broken:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[int, int]]:
        return divmod, (1, 0)


# arrays

DTYPES = [
    *("?", "i1", "u8", ">i4", "<f2", "f8", "g", "c8", "G", "S5", "U3", "M8[s]", "m8[ns]", "V6"),
    np.dtype([("a", "i4"), ("b", "f8", (2, 2))]),
    np.dtype({"names": ["x", "y"], "formats": ["u1", ">f4"], "offsets": [1, 8], "itemsize": 16}),
]


def assert_same(arrived: np.ndarray[Any, Any], array: np.ndarray[Any, Any]) -> None:
    assert type(arrived) is np.ndarray
    assert (arrived.dtype, arrived.shape) == (array.dtype, array.shape)
    assert arrived.tobytes() == array.tobytes()


@pytest.mark.parametrize("size", [0, 3, LARGE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_of_every_type_arrive_equal_and_read_only_whatever_their_size(dtype: Any, size: int) -> None:
    itemsize = np.dtype(dtype).itemsize
    array = np.frombuffer(bytes(index % 2 for index in range(size * itemsize)), dtype=dtype).reshape(1, size)

    arrived = sent(array)

    assert_same(arrived, array)
    assert not arrived.flags.writeable
    with pytest.raises(ValueError, match=r"WRITEABLE|write"):
        arrived.flags.writeable = True


@UNHURRIED
@given(arrays.arrays(dtype=st.sampled_from(["i4", "f8", "?"]), shape=arrays.array_shapes(min_dims=0, min_side=0)))
def test_arrays_of_every_shape_arrive_equal(array: np.ndarray[Any, Any]) -> None:
    assert_same(sent(array), array)
    assert_same(sent(array.T), array.T)


@pytest.mark.parametrize("side", [3, 100])
def test_column_order_is_kept_and_not_copied_through_row_order(side: int) -> None:
    array = np.asfortranarray(np.arange(side * side * 2).reshape(side, side, 2))

    arrived = sent(array)

    assert_same(arrived, array)
    assert arrived.flags.f_contiguous
    assert not arrived.flags.c_contiguous


@pytest.mark.parametrize(
    "view", [np.s_[::2], np.s_[:, ::-3], np.s_[5:1:-1, None, 4:9], np.s_[2, ::50], np.s_[..., 0], np.s_[3, 4]]
)
@pytest.mark.parametrize("side", [10, 300])
def test_strided_views_arrive_equal_and_contiguous(view: Any, side: int) -> None:
    array = np.arange(side * side, dtype="f8").reshape(side, side)[view]

    arrived = sent(np.asarray(array))

    assert_same(arrived, np.asarray(array))
    assert arrived.flags.c_contiguous


def test_transposed_and_broadcast_arrays_arrive_equal() -> None:
    cube = np.arange(24 * 500).reshape(2, 3, 4, 500)

    for array in (cube.transpose(1, 0, 3, 2), np.broadcast_to(np.arange(700), (30, 700)), cube.T):
        assert_same(sent(array), array)


def test_a_read_only_array_can_be_sent() -> None:
    array = np.arange(LARGE)
    array.flags.writeable = False

    assert_same(sent(array), array)


@pytest.mark.parametrize("size", [3, LARGE])
def test_object_arrays_arrive_with_their_objects(size: int) -> None:
    array = np.array([Settings(0.5, ["a"]), None, "text"] * (size // 3), dtype=object)

    assert list(sent(array)) == list(array)


def test_array_subclasses_arrive_as_such() -> None:
    masked = sent(np.ma.masked_array(np.arange(LARGE), mask=np.arange(LARGE) % 2 == 1))
    record = sent(np.rec.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]))

    assert masked.sum() == sum(range(0, LARGE, 2))
    assert (type(record), record.a[0], record.b[0]) == (np.recarray, 1, 2.5)


def test_arrays_without_bytes_arrive() -> None:
    for array in (np.zeros((3, 0, 5), "f4"), np.zeros(4, np.dtype([])), np.zeros(0, "O")):
        arrived = sent(array)
        assert (arrived.shape, arrived.dtype) == (array.shape, array.dtype)


def test_buffers_up_to_the_limit_stay_in_the_pickle_and_larger_ones_do_not() -> None:
    small, large = np.zeros(IN_BAND_BYTES, "u1"), np.zeros(LARGE, "u1")

    assert dump(small).buffers == ()
    assert [view.nbytes for view in dump([small, large]).buffers] == [LARGE]


def test_the_size_of_a_payload_is_that_of_its_body_and_its_buffers() -> None:
    payload = dump([np.zeros(LARGE, "u1"), np.zeros(2 * LARGE, "u1")])

    assert payload.size_bytes == len(payload.body) + 3 * LARGE
    assert Payload(b"abc").size_bytes == 3


def test_a_large_array_is_neither_copied_into_the_pickle_nor_copied_at_all() -> None:
    array = np.arange(LARGE)

    payload = dump({"x": array})

    assert len(payload.body) < 1000
    assert np.shares_memory(np.frombuffer(payload.buffers[0], array.dtype), array)
    assert all(view.readonly for view in payload.buffers)


def test_an_array_on_a_buffer_that_could_be_written_to_is_read_only_too() -> None:
    payload = dump(np.arange(LARGE))

    assert not load(payload.body, [bytearray(payload.buffers[0])]).flags.writeable


def test_a_received_array_stands_on_the_received_buffer() -> None:
    payload = dump(np.arange(LARGE))
    buffer = bytes(payload.buffers[0])

    arrived = load(payload.body, [buffer])

    assert np.shares_memory(arrived, np.frombuffer(buffer, "u1"))
