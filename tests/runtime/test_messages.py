"""What travels: snapshots, shared memory and its leases, broken messages, and bounds on what is under way."""

# Endpoints here take and return anything, and some calls are wrong on purpose.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest

from danaus import (
    Actor,
    ActorError,
    Channel,
    MessageError,
    Port,
    ProcMesh,
    SupervisionError,
    endpoint,
    scatter,
    this_host,
    this_proc,
)
from danaus.runtime.context import local_proc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

np = pytest.importorskip("numpy")

# The workers of a test run cannot import this file by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

LIMIT_S = 15
MIB = 1 << 20


class Box(Actor):
    """Holds one thing and returns it."""

    def __init__(self) -> None:
        self.kept: Any = None
        self.num_taken = 0

    @endpoint
    def echo(self, value: Any) -> Any:
        return value

    @endpoint
    def keep(self, value: Any) -> None:
        self.kept = value

    @endpoint
    def give(self) -> Any:
        return self.kept

    @endpoint
    def take(self, value: Any) -> None:
        self.num_taken += 1

    @endpoint
    def taken(self) -> int:
        return self.num_taken

    @endpoint
    def total(self, array: Any) -> float:
        return float(array.sum())

    @endpoint
    def make(self, num_bytes: int) -> Any:
        return np.full(num_bytes, 7, np.uint8)

    @endpoint
    def write(self, array: Any) -> float:
        array[0] = 5
        return float(array.sum())

    @endpoint
    def is_writeable(self, array: Any) -> bool:
        return bool(array.flags.writeable)

    @endpoint
    def change_kept(self) -> None:
        self.kept[0] = -1

    @endpoint(borrow=True)
    def borrowed_total(self, tensor: Any) -> tuple[float, int]:
        return float(tensor.sum()), tensor.data_ptr() % 64

    @endpoint
    def hold(self, inside: Port[Port[Any]]) -> Any:
        port, receiver = Channel.open()
        inside.send(port)
        return receiver.recv().get(timeout=30)

    @endpoint
    def result(self, make: Callable[[], Any]) -> Any:
        return make()

    @endpoint
    def fail(self, make: Callable[[], BaseException]) -> None:
        raise make()

    @endpoint
    def flood(self, other: Box, count: int) -> None:
        for number in range(count):
            other.take.broadcast(number)

    @endpoint
    async def flood_async(self, other: Box, count: int) -> None:
        await asyncio.gather(*(other.take.call_one(number).as_asyncio() for number in range(count)))

    @endpoint
    def num_fds(self) -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    @endpoint
    def resident_bytes(self) -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @endpoint
    def leases(self) -> int:
        pool = local_proc().attachments._pool
        return 0 if pool is None else pool.stats().leases

    @endpoint
    def pid(self) -> int:
        return os.getpid()


@pytest.fixture(scope="module")
def procs() -> Iterator[ProcMesh]:
    with this_host().spawn_procs({"rank": 2}, name="messages") as procs:
        yield procs


@pytest.fixture
def boxes(procs: ProcMesh) -> Iterator[Box]:
    boxes = procs.spawn("boxes", Box)
    yield boxes
    boxes.stop()


@pytest.fixture
def one(boxes: Box) -> Box:
    return boxes.slice(rank=0)


def leases() -> int:
    pool = local_proc().attachments._pool
    return 0 if pool is None else pool.stats().leases


def held(call: Callable[[Port[Any]], Any]) -> tuple[Any, Port[Any]]:
    """Make a call that waits inside the actor; return its future, and the port that lets it go."""
    port, receiver = Channel.open()
    future = call(port)
    return future, receiver.recv().get(timeout=LIMIT_S)


def alive(one: Box) -> bool:
    return one.echo.call_one("alive").get(timeout=LIMIT_S) == "alive"


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(1 << 70),
        3.5,
        1j,
        "",
        "text \udc80",
        b"\x00\xff",
        b"x" * 300_000,
        "x" * 300_000,
        (1, [2, {"three": (4,)}]),
        {1: "int key", None: 2},
        {"deep": [[[[[[[1]]]]]]]},
        list(range(50_000)),
        {frozenset({1}): {2}},
        bytearray(b"mutable"),
        range(5),
        ...,
    ],
    ids=lambda value: f"{type(value).__name__}-{len(repr(value))}",
)
def test_value_arrives_as_it_was_sent(one: Box, value: object) -> None:
    back = one.echo.call_one(value).get(timeout=LIMIT_S)

    assert back == value
    assert type(back) is type(value)


def test_functions_and_classes_of_the_script_travel_by_value(one: Box) -> None:
    factor = 3

    class Local:
        def __init__(self, number: int) -> None:
            self.number = number

    times, made = one.echo.call_one((lambda number: number * factor, Local(4))).get(timeout=LIMIT_S)

    assert times(2) == 6
    assert made.number == 4


def test_arguments_are_a_snapshot_of_the_moment_of_the_call(one: Box) -> None:
    future, release = held(one.hold.call_one)
    small, large, array, nested = [1], [0] * 100_000, np.zeros(MIB), {"array": np.zeros(10)}
    futures = [one.echo.call_one(value) for value in (small, large, array, nested)]

    small.append(2)
    large[0] = 1
    array[:] = 1
    nested["array"][:] = 1
    release.send(None)

    future.get(timeout=LIMIT_S)
    values = [future.get(timeout=LIMIT_S) for future in futures]
    assert values[0] == [1]
    assert values[1][0] == 0
    assert values[2].sum() == 0
    assert values[3]["array"].sum() == 0


def test_result_is_a_snapshot_of_the_moment_of_the_return(one: Box) -> None:
    one.keep.call_one(list(range(10))).get(timeout=LIMIT_S)
    first = one.give.call_one()
    one.change_kept.call_one().get(timeout=LIMIT_S)

    assert first.get(timeout=LIMIT_S)[0] == 0
    assert one.give.call_one().get(timeout=LIMIT_S)[0] == -1


def test_actors_of_one_process_share_no_objects_either() -> None:
    box = this_proc().spawn("box", Box)
    mine = [1]
    box.keep.call_one(mine).get(timeout=LIMIT_S)
    mine.append(2)

    assert box.give.call_one().get(timeout=LIMIT_S) == [1]
    array = np.ones(MIB)
    assert box.total.call_one(array).get(timeout=LIMIT_S) == MIB
    box.stop().get(timeout=LIMIT_S)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3), (512, 1024)])
@pytest.mark.parametrize("dtype", ["f8", "i1", ">i4", "c16", "?", "M8[s]", "U3"])
def test_array_keeps_shape_type_and_values(one: Box, shape: tuple[int, ...], dtype: str) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)

    back = one.echo.call_one(array).get(timeout=LIMIT_S)

    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert (back == array).all()


def test_views_of_every_layout_arrive_with_their_values(one: Box) -> None:
    base = np.arange(2 * MIB, dtype=np.float32).reshape(1024, 2048)
    views = [
        base.T,
        base[::2, ::3],
        base[::-1],
        np.asfortranarray(base),
        np.broadcast_to(base[0], (4, 2048)),
        base[5:6],
    ]
    structured = np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")])
    objects = np.array([{"x": 1}, None], dtype=object)

    backs = one.echo.call_one([*views, structured, objects]).get(timeout=LIMIT_S)

    assert all((back == view).all() for back, view in zip(backs, [*views, structured], strict=False))
    assert backs[-1][0] == {"x": 1}


@pytest.mark.parametrize("num_bytes", [8, 10_000, 100_000, 4 * MIB])
def test_arrays_arrive_read_only_whatever_their_size_both_ways(one: Box, num_bytes: int) -> None:
    array = np.zeros(num_bytes, np.uint8)

    assert not one.is_writeable.call_one(array).get(timeout=LIMIT_S)
    back = one.echo.call_one(array).get(timeout=LIMIT_S)
    assert not back.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        back[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        back.flags.writeable = True
    error = one.write.call_one(array).exception(timeout=LIMIT_S)
    assert isinstance(error, ActorError)
    assert isinstance(error.exception, ValueError)


def test_received_array_stays_as_it_was_while_the_sender_goes_on_sending(one: Box) -> None:
    first = one.echo.call_one(np.full(4 * MIB, 1, np.uint8)).get(timeout=LIMIT_S)
    one.keep.call_one(np.full(4 * MIB, 2, np.uint8)).get(timeout=LIMIT_S)

    for number in range(3, 20):
        assert one.total.call_one(np.full(4 * MIB, number, np.uint8)).get(timeout=LIMIT_S) == 4 * MIB * number

    assert first.min() == first.max() == 1
    assert one.give.call_one().get(timeout=LIMIT_S).max() == 2


def test_array_that_was_received_outlives_its_sender() -> None:
    with this_host().spawn_procs({"rank": 1}, name="short", preload=[]) as procs:
        array = procs.spawn("box", Box).make.call_one(4 * MIB).get(timeout=LIMIT_S)

    assert array.min() == array.max() == 7


def test_cast_of_one_array_is_seen_whole_by_every_rank(boxes: Box) -> None:
    array = np.arange(MIB)

    assert list(boxes.total.call(array).get(timeout=LIMIT_S)) == [array.sum()] * 2
    assert list(boxes.total.call(scatter([array, array + 1])).get(timeout=LIMIT_S)) == [array.sum(), array.sum() + MIB]


@pytest.mark.torch
def test_tensors_arrive_as_private_writable_copies_with_all_that_they_are(one: Box) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(MIB, dtype=torch.float32).reshape(1024, 1024)
    parameter = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    tensors = [
        base,
        base.T,
        base[::2],
        base.to(torch.bfloat16),
        torch.tensor(3),
        torch.empty(0, 4),
        parameter,
        base[0].bool(),
    ]
    leaf = torch.ones(2, requires_grad=True)

    backs = one.echo.call_one(tensors).get(timeout=LIMIT_S)

    for back, tensor in zip(backs, tensors, strict=True):
        assert (back.dtype, back.shape, type(back)) == (tensor.dtype, tensor.shape, type(tensor))
        assert torch.equal(back, tensor)
    assert one.echo.call_one(leaf).get(timeout=LIMIT_S).requires_grad
    assert not one.echo.call_one(leaf * 2).get(timeout=LIMIT_S).requires_grad
    backs[0].fill_(1)
    assert float(base[0, 5]) == 5
    assert one.write.call_one(torch.zeros(MIB)).get(timeout=LIMIT_S) == 5


@pytest.mark.torch
def test_borrowed_tensor_is_a_view_whose_lease_comes_back(one: Box) -> None:
    torch = pytest.importorskip("torch")

    total, alignment = one.borrowed_total.call_one(torch.ones(MIB)).get(timeout=LIMIT_S)

    assert (total, alignment) == (MIB, 0)
    assert alive(one)
    assert leases() == 0


def test_two_hundred_large_messages_leave_no_lease_no_descriptor_and_little_memory(boxes: Box) -> None:
    array = np.ones(4 * MIB, np.uint8)
    one = boxes.slice(rank=0)

    def once() -> None:
        assert boxes.total.call(array).get(timeout=LIMIT_S).item(rank=1) == 4 * MIB
        assert one.echo.call_one(array).get(timeout=LIMIT_S)[0] == 1

    for _ in range(10):
        once()
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), list(boxes.num_fds.call().get(timeout=LIMIT_S))
    resident = one.resident_bytes.call_one().get(timeout=LIMIT_S)

    for _ in range(200):
        once()

    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), list(boxes.num_fds.call().get(timeout=LIMIT_S))) == before
    assert leases() == 0
    assert list(boxes.leases.call().get(timeout=LIMIT_S)) == [0, 0]
    # 200 x 4 MiB were sent each way.
    assert one.resident_bytes.call_one().get(timeout=LIMIT_S) < resident + 40 * MIB


def test_lease_is_held_while_the_array_is_and_comes_back_with_its_last_view(one: Box) -> None:
    one.keep.call_one(np.ones(MIB)).get(timeout=LIMIT_S)
    assert leases() == 1

    one.keep.call_one(None).get(timeout=LIMIT_S)
    assert alive(one)

    assert leases() == 0


@pytest.mark.parametrize("give_up", ["cancel", "timeout", "stop"])
def test_large_message_that_nobody_loads_gives_its_lease_back(procs: ProcMesh, give_up: str) -> None:
    one = procs.slice(rank=0).spawn("box", Box)
    future, release = held(one.hold.call_one)
    options = {"timeout": 0.05} if give_up == "timeout" else {}
    queued = one.total.options(**options).call_one(np.ones(MIB))
    if give_up == "cancel":
        queued.cancel()
    if give_up == "timeout":
        assert isinstance(queued.exception(timeout=LIMIT_S), TimeoutError)
    if give_up == "stop":
        # The actor dies with its current call, before the queued one.
        release.send(None)
        one.stop().get(timeout=LIMIT_S)
        queued.exception(timeout=LIMIT_S)
    else:
        release.send(None)
        assert alive(one)
    future.get(timeout=LIMIT_S)
    other = procs.slice(rank=0).spawn("other", Box)

    assert alive(other)
    assert leases() == 0


def test_lease_of_a_dropped_reply_comes_back(one: Box) -> None:
    for _ in range(5):
        one.make.call_one(4 * MIB)
    futures = [one.make.call_one(4 * MIB) for _ in range(3)]
    for future in futures:
        future.cancel()
    del futures, future

    # Returned with whatever this process says next, at the latest after the I/O thread's next look.
    assert _soon(lambda: one.leases.call_one().get(timeout=LIMIT_S) == 0)


def test_lease_of_a_broadcast_comes_back_without_another_message(one: Box) -> None:
    one.total.broadcast(np.ones(MIB))

    assert _soon(lambda: leases() == 0)


def _soon(condition: Callable[[], bool], limit_s: float = 3.0) -> bool:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        threading.Event().wait(0.01)
    return True


class FailsToPickle:
    def __reduce__(self) -> Any:
        raise RuntimeError("not to be pickled")


def explode(*_args: object) -> Any:
    raise RuntimeError("not to be loaded")


class FailsToLoad:
    def __reduce__(self) -> Any:
        return explode, (1,)


class FailsInSetState:
    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}

    def __setstate__(self, state: dict[str, int]) -> None:
        raise RuntimeError("no such state")


@pytest.mark.parametrize("make", [threading.Lock, FailsToPickle, lambda: [np.ones(MIB), threading.Lock()]])
def test_argument_that_cannot_be_pickled_fails_at_the_call_and_says_which_call(
    one: Box, make: Callable[[], object]
) -> None:
    before = set(local_proc().ports)

    with pytest.raises(MessageError, match=r"boxes\.echo.*cannot be pickled here"):
        one.echo.call_one(make())
    with pytest.raises(MessageError, match=r"boxes\.take.*cannot be pickled here"):
        one.take.broadcast(make())

    assert set(local_proc().ports) <= before
    assert leases() == 0
    assert alive(one)


@pytest.mark.parametrize("broken", [FailsToLoad(), FailsInSetState()])
def test_argument_that_cannot_be_loaded_fails_its_call_alone_with_the_other_sides_reason(
    one: Box, broken: object
) -> None:
    before, failing, after = one.echo.call_one(1), one.echo.call_one(broken), one.echo.call_one(2)

    error = failing.exception(timeout=LIMIT_S)

    assert isinstance(error, MessageError)
    for part in ("boxes.echo", "rank 0", "could not be loaded there", "RuntimeError: no"):
        assert part in str(error)
    assert [before.get(timeout=LIMIT_S), after.get(timeout=LIMIT_S)] == [1, 2]


def test_class_that_the_other_side_does_not_have_fails_that_call_alone(one: Box) -> None:
    class Elsewhere:
        pass

    Elsewhere.__module__ = "no_such_module"
    Elsewhere.__qualname__ = "Elsewhere"
    module = type(sys)("no_such_module")
    module.Elsewhere = Elsewhere  # type: ignore[attr-defined]
    sys.modules["no_such_module"] = module
    try:
        error = one.echo.call_one(Elsewhere()).exception(timeout=LIMIT_S)
    finally:
        del sys.modules["no_such_module"]

    assert isinstance(error, MessageError)
    assert "No module named 'no_such_module'" in str(error)
    assert alive(one)


@pytest.mark.parametrize("make", [threading.Lock, FailsToPickle])
def test_result_that_cannot_be_pickled_fails_its_call_alone(one: Box, make: Callable[[], object]) -> None:
    error = one.result.call_one(make).exception(timeout=LIMIT_S)

    assert isinstance(error, ActorError)
    for part in ("boxes.result", "cannot be pickled", "return plain data"):
        assert part in str(error)
    assert alive(one)


@pytest.mark.parametrize("make", [FailsToLoad, FailsInSetState])
def test_result_that_cannot_be_loaded_here_fails_its_call_alone(one: Box, make: Callable[[], object]) -> None:
    error = one.result.call_one(make).exception(timeout=LIMIT_S)

    assert isinstance(error, MessageError)
    assert "could not be loaded here" in str(error)
    assert "RuntimeError: no" in str(error)
    assert alive(one)


class NeedsTwoError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__("text of two")
        self.lock = threading.Lock() if first == 0 else None


class BadTextError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: NeedsTwoError(0, 1), "NeedsTwoError: text of two"),
        (lambda: NeedsTwoError(1, 1), "NeedsTwoError: text of two"),
        (lambda: ValueError(threading.Lock()), "ValueError: <unlocked"),
        (lambda: ValueError(FailsToLoad()), "ValueError: <"),
        (lambda: ValueError(np.ones(MIB)), "ValueError: [1."),
        (BadTextError, "BadTextError"),
        (lambda: ExceptionGroup("several", [ValueError(1), KeyError(2)]), "several"),
        (lambda: StopIteration(3), "StopIteration"),
        (lambda: ValueError("x" * 500_000), "ValueError: xxx"),
    ],
    ids=[
        "lock_inside",
        "two_arguments",
        "unpicklable_argument",
        "unloadable_argument",
        "array",
        "text",
        "group",
        "stop",
        "long",
    ],
)
def test_exception_of_any_kind_reaches_the_caller_at_least_as_text(
    one: Box, make: Callable[[], Any], text: str
) -> None:
    error = one.fail.call_one(make).exception(timeout=LIMIT_S)

    assert isinstance(error, ActorError)
    assert text in str(error)
    assert "in fail" in error.remote_traceback
    assert pickle.loads(pickle.dumps(str(error))) == str(error)
    assert alive(one)


def test_broken_message_without_a_caller_fails_the_actor_and_tells_the_next(one: Box) -> None:
    one.take.broadcast(FailsToLoad())

    error = one.echo.call_one(1).exception(timeout=LIMIT_S)

    assert isinstance(error, SupervisionError)
    assert "not to be loaded" in str(error)


@pytest.mark.parametrize("method", ["flood", "flood_async"])
def test_two_actors_that_flood_each_other_over_mailboxes_of_one_come_through(procs: ProcMesh, method: str) -> None:
    small = procs.spawn("small", Box, mailbox=1)
    first, second = small.slice(rank=0), small.slice(rank=1)

    if method == "flood":
        floods = [first.flood.call_one(second, 300), second.flood.call_one(first, 300)]
        for flood in floods:
            flood.get(timeout=LIMIT_S)
    else:
        # Both are busy until all is handled by the other: only one at a time can be.
        first.flood_async.call_one(second, 300).get(timeout=LIMIT_S)
        second.flood_async.call_one(first, 300).get(timeout=LIMIT_S)

    assert list(small.taken.call().get(timeout=LIMIT_S)) == [300, 300]
    small.stop()


def test_cycle_of_three_that_flood_over_mailboxes_of_one_comes_through(procs: ProcMesh) -> None:
    boxes = [procs.slice(rank=number % 2).spawn(f"ring{number}", Box, mailbox=1) for number in range(3)]

    floods = [boxes[number].flood.call_one(boxes[(number + 1) % 3], 200) for number in range(3)]

    for flood in floods:
        flood.get(timeout=LIMIT_S)
    assert [box.taken.call_one().get(timeout=LIMIT_S) for box in boxes] == [200] * 3


def test_actor_that_floods_itself_comes_through(procs: ProcMesh) -> None:
    box = procs.slice(rank=0).spawn("self", Box, mailbox=1)

    box.flood.call_one(box, 100).get(timeout=LIMIT_S)

    assert box.taken.call_one().get(timeout=LIMIT_S) == 100


def test_broadcast_of_more_bytes_than_the_bound_goes_on_as_they_are_handled(one: Box) -> None:
    # 400 MiB through a bound of 256.
    array = np.ones(4 * MIB, np.uint8)
    done = threading.Event()

    def send() -> None:
        for _ in range(100):
            one.take.broadcast(array)
        done.set()

    threading.Thread(target=send, daemon=True).start()

    assert done.wait(LIMIT_S)
    assert one.taken.call_one().get(timeout=LIMIT_S) == 100


def test_slow_receiver_bounds_what_its_senders_keep_in_memory(procs: ProcMesh) -> None:
    slow = procs.slice(rank=0).spawn("slow", Box, mailbox=8)
    future, release = held(slow.hold.call_one)
    num_sent, sent = 0, threading.Event()
    payload = "x" * 30_000

    def send() -> None:
        nonlocal num_sent
        for _ in range(100):
            slow.take.broadcast(payload)
            num_sent += 1
        sent.set()

    threading.Thread(target=send, daemon=True).start()
    assert not sent.wait(0.3)
    # The held call is one of the eight.
    assert num_sent == 7

    release.send(None)
    future.get(timeout=LIMIT_S)
    assert sent.wait(LIMIT_S)
    assert slow.taken.call_one().get(timeout=LIMIT_S) == 100


def test_sender_blocked_on_a_full_mailbox_hears_of_the_receivers_death() -> None:
    with this_host().spawn_procs({"rank": 1}, name="dies", preload=[]) as procs:
        box = procs.spawn("box", Box, mailbox=1)
        pid = box.pid.call_one().get(timeout=LIMIT_S)
        future, _ = held(box.hold.call_one)
        errors: list[BaseException] = []
        waits, ended = threading.Event(), threading.Event()

        def send() -> None:
            waits.set()
            try:
                box.take.broadcast(1)
            except SupervisionError as error:
                errors.append(error)
            ended.set()

        threading.Thread(target=send, daemon=True).start()
        assert waits.wait(LIMIT_S)
        os.kill(pid, 9)

        assert ended.wait(LIMIT_S)
        assert len(errors) == 1
        assert isinstance(future.exception(timeout=LIMIT_S), SupervisionError)
