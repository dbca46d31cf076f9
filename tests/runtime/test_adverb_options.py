"""What is decided before a message leaves: definitions, signatures, options, scattered arguments, who is chosen."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danaus import Actor, as_endpoint, concurrent_endpoint, endpoint, scatter
from danaus.runtime.actor import EndpointKind, endpoints_of, reserved_names
from danaus.runtime.actor_mesh import ActorMesh
from danaus.runtime.calls.caller import CallOptions
from danaus.runtime.calls.choice import pick
from danaus.runtime.calls.reduction import reducer
from danaus.runtime.calls.scatter import scattered
from danaus.runtime.calls.value_mesh import ValueMesh
from danaus.runtime.context import set_local_proc
from danaus.runtime.errors import CallTimeoutError, MessageError, SupervisionError
from danaus.runtime.failure import FailureKind, MeshFailure
from danaus.runtime.mesh import ProcMesh
from danaus.runtime.messages import wire
from danaus.runtime.messages.link import Lane
from danaus.runtime.shapes.shape import Extent, Region

from .fakes import FakeLink, FakeProc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

# A busy machine is no reason to fail.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture
def proc() -> Iterator[FakeProc]:
    """A fake process as the one that this code runs in."""
    fake = FakeProc()
    set_local_proc(fake)  # type: ignore[arg-type]
    yield fake
    set_local_proc(None)


def mesh_of(actor_class: type, *, mailbox: int = 8, **sizes: int) -> Any:
    region = Extent.of(sizes).region
    return ActorMesh("counters", "key", actor_class, ProcMesh("w", "w", region), region, mailbox)


UNUSUAL = np.zeros(3)


class Counter(Actor):
    @endpoint
    def add(self, k: int, *, times: int = 1) -> int: ...

    @endpoint
    def many(self, first: int, /, second: int = 2, *rest: int, key: str = "", **options: int) -> None: ...

    @endpoint
    async def slow(self, seconds: float) -> None: ...

    @endpoint
    def items(self, n: int) -> Iterator[int]:
        yield n

    @endpoint
    async def async_items(self, n: int) -> AsyncIterator[int]:
        yield n

    @endpoint(explicit_response_port=True)
    def later(self, port: Any, k: int) -> None: ...

    @endpoint
    def own_words(self, session: int = 0, reduce: int = 0) -> None: ...

    def helper(self, k: int) -> int: ...

    limit = 3


# definitions


def test_an_endpoint_knows_its_kind() -> None:
    kinds = {name: spec.kind for name, spec in endpoints_of(Counter).items()}

    assert kinds == {
        "add": EndpointKind.SYNC,
        "many": EndpointKind.SYNC,
        "slow": EndpointKind.ASYNC,
        "items": EndpointKind.GENERATOR,
        "async_items": EndpointKind.ASYNC_GENERATOR,
        "later": EndpointKind.SYNC,
        "own_words": EndpointKind.SYNC,
    }
    assert {name for name, spec in endpoints_of(Counter).items() if spec.is_stream} == {"items", "async_items"}


@pytest.mark.parametrize("base", [object, int, Exception, 7, None, Counter.add, "Counter"], ids=repr)
def test_what_is_no_actor_class_is_refused_by_name(base: Any) -> None:
    with pytest.raises(TypeError, match=r"derived from danaus\.Actor, got"):
        endpoints_of(base)


@pytest.mark.parametrize(
    "thing", [7, print, str, staticmethod(len), property(len), classmethod(type), object()], ids=repr
)
def test_an_endpoint_has_to_be_a_function(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"@endpoint: expected a method"):
        endpoint(thing)


def test_an_endpoint_cannot_be_decorated_twice() -> None:
    def method(self: Any) -> None: ...

    endpoint(method)
    with pytest.raises(TypeError, match="method is an endpoint already"):
        endpoint(method)
    with pytest.raises(TypeError, match="endpoint already"):
        endpoint(borrow=True)(method)


@pytest.mark.parametrize("decorator", [endpoint(concurrency=2), concurrent_endpoint])
def test_overlapping_calls_of_a_sync_method_are_refused_with_the_reason(decorator: Any) -> None:
    def method(self: Any) -> None: ...

    def generator(self: Any) -> Iterator[int]:
        yield 1

    for function in (method, generator):
        with pytest.raises(ValueError, match=r"a sync endpoint has one thread; write it with `async def`"):
            decorator(function)


@pytest.mark.parametrize("concurrency", [0, -1])
def test_a_concurrency_below_one_is_refused(concurrency: int) -> None:
    async def method(self: Any) -> None: ...

    with pytest.raises(ValueError, match=f"concurrency={concurrency}.*expected 1 or more"):
        endpoint(concurrency=concurrency)(method)


def test_options_of_the_decorator_are_kept() -> None:
    class Options(Actor):
        @endpoint(concurrency=3, borrow=True)
        async def three(self) -> None: ...

        @concurrent_endpoint
        async def unlimited(self) -> None: ...

        @endpoint(explicit_response_port=True)
        def later(self, port: Any) -> None: ...

    specs = endpoints_of(Options)

    assert (specs["three"].options.concurrency, specs["three"].options.borrow) == (3, True)
    assert specs["unlimited"].options.concurrency > 1_000_000
    assert specs["later"].options.explicit_response_port


DUNDERS = ["__init__", "__call__", "__cleanup__", "__getattr__", "__len__"]


@pytest.mark.parametrize("name", [*DUNDERS, *sorted(name for name in reserved_names() if name[:2] != "__")])
def test_an_endpoint_cannot_have_the_name_of_anything_that_a_mesh_has(name: str) -> None:
    def method(self: Any) -> None: ...

    with pytest.raises(ValueError, match=f"Colliding.{name}: every actor mesh has an attribute of this name"):
        endpoints_of(type("Colliding", (Actor,), {name: endpoint(method)}))


def test_every_attribute_of_a_handle_is_reserved() -> None:
    mesh = mesh_of(Counter, dp=1)

    assert {*dir(ActorMesh), *vars(mesh)} <= reserved_names()
    assert {"name", "slice", "stop", "extent", "size", "initialized", "_lanes"} <= reserved_names()


@pytest.mark.parametrize("wrapper", [staticmethod, classmethod, property])
def test_an_endpoint_that_is_no_plain_method_is_refused(wrapper: Any) -> None:
    def method(self: Any) -> None: ...

    wrapped = type("Wrapped", (Actor,), {"method": wrapper(endpoint(method))})

    with pytest.raises(
        TypeError, match=rf"Wrapped\.method: an endpoint is a plain method; leave out {wrapper.__name__}"
    ):
        endpoints_of(wrapped)


def test_endpoints_are_inherited_and_overridden() -> None:
    class Base(Actor):
        @endpoint
        def kept(self, a: int) -> None: ...

        @endpoint
        def changed(self, a: int) -> None: ...

    class Derived(Base):
        @endpoint
        def changed(self, a: int, b: int) -> None: ...  # pyright: ignore[reportIncompatibleVariableOverride]

    specs = endpoints_of(Derived)

    assert sorted(specs) == ["changed", "kept"]
    specs["changed"].check(1, 2)
    with pytest.raises(TypeError, match=r"Derived\.changed\(\)"):
        specs["changed"].check(1)
    assert specs["kept"].parameters == {"a"}
    assert endpoints_of(Base)["changed"].parameters == {"a"}


# signatures


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((1,), {}), ((), {"k": 1}), ((1,), {"times": 3}), ((scatter([1]),), {})],
)
def test_arguments_that_fit_are_sent(proc: FakeProc, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mesh_of(Counter, dp=1).add.call(*args, **kwargs)

    assert len(proc.calls()["w.0"]) == 1


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [
        ((), {}, "missing 1 required positional argument: 'k'"),
        ((1, 2), {}, "takes 1 positional argument but 2"),
        ((1,), {"tines": 3}, "unexpected keyword argument 'tines'"),
        ((1,), {"k": 1}, "multiple values for argument 'k'"),
    ],
)
@pytest.mark.parametrize("adverb", ["call", "call_one", "choose", "stream", "broadcast"])
def test_wrong_arguments_are_a_type_error_at_the_call_that_names_class_and_method(
    proc: FakeProc, adverb: str, args: tuple[Any, ...], kwargs: dict[str, Any], why: str
) -> None:
    with pytest.raises(TypeError, match=r"Counter\.add\(\) .*" + why):
        getattr(mesh_of(Counter, dp=1).add, adverb)(*args, **kwargs)

    assert proc.calls() == {}
    assert proc.ports == {}


def test_every_kind_of_parameter_is_checked_as_python_does(proc: FakeProc) -> None:
    many = mesh_of(Counter, dp=1).many
    many.call(1)
    many.call(1, 2, 3, 4, key="k", other=5)
    many.call(1, second=2)

    with pytest.raises(TypeError, match=r"Counter\.many"):
        many.call(first=1)
    assert proc.arguments()["w.0"] == [
        ((1,), {}),
        ((1, 2, 3, 4), {"key": "k", "other": 5}),
        ((1,), {"second": 2}),
    ]


def test_the_response_port_is_not_an_argument_of_the_caller(proc: FakeProc) -> None:
    mesh_of(Counter, dp=1).later.call(5)

    with pytest.raises(TypeError, match=r"Counter\.later"):
        mesh_of(Counter, dp=1).later.call("port", 5)
    assert proc.arguments() == {"w.0": [((5,), {})]}


def test_a_default_value_of_any_kind_does_not_matter() -> None:
    class Defaults(Actor):
        @endpoint
        def method(self, a: Any = UNUSUAL, *, b: Any = UNUSUAL, c: int = 3) -> None: ...

    endpoints_of(Defaults)["method"].check()
    endpoints_of(Defaults)["method"].check(1, b=2, c=5)


def test_an_endpoint_called_directly_says_how_to_call_it() -> None:
    with pytest.raises(TypeError, match=r"counters\.add: .*\.call\(\.\.\.\) for all ranks"):
        mesh_of(Counter, dp=1).add(1)


def test_a_method_without_the_decorator_says_so_in_every_way_it_is_used() -> None:
    helper = mesh_of(Counter, dp=1).helper

    for use in (lambda: helper(1), lambda: helper.call(1), lambda: helper.broadcast(1)):
        with pytest.raises(RuntimeError, match=r"Counter\.helper is not an endpoint: .*as_endpoint"):
            use()


@pytest.mark.parametrize("name", ["subtract", "limit"])
def test_an_endpoint_that_does_not_exist_names_those_there_are(name: str) -> None:
    with pytest.raises(
        AttributeError, match=f"Counter has no endpoint '{name}'; its endpoints: add, async_items, items"
    ):
        getattr(mesh_of(Counter, dp=1), name)


def test_as_endpoint_calls_an_undecorated_method(proc: FakeProc) -> None:
    mesh = mesh_of(Counter, dp=1)
    as_endpoint(mesh.helper).call(1)

    [call] = proc.calls()["w.0"]
    assert (call[2], call[8] & wire.UNDECORATED) == ("helper", wire.UNDECORATED)
    with pytest.raises(TypeError, match=r"Counter\.helper"):
        as_endpoint(mesh.helper).call()
    with pytest.raises(TypeError, match="expected a method of an actor mesh"):
        as_endpoint(len)
    assert as_endpoint(mesh.add) is mesh.add


def test_handles_list_their_endpoints() -> None:
    assert {"add", "slow", "items", "slice", "stop"} <= set(dir(mesh_of(Counter, dp=1)))


# adverbs


def test_call_sends_one_message_to_each_rank_with_its_slot_and_the_shape(proc: FakeProc) -> None:
    mesh_of(Counter, hosts=2, gpus=2).slice(gpus=1).add.call(7)

    calls = proc.calls()
    assert sorted(calls) == ["w.1", "w.3"]
    assert [(call[6], call[7]) for [call] in calls.values()] == [(0, [["hosts"], [2]]), (1, [["hosts"], [2]])]
    assert {call[5] for [call] in calls.values()} == set(proc.ports)


def test_broadcast_awaits_nothing_and_has_its_credit_returned(proc: FakeProc) -> None:
    assert mesh_of(Counter, dp=2).add.broadcast(7) is None

    assert proc.ports == {}
    assert [(call[5], call[8]) for [call] in proc.calls().values()] == [(0, wire.RETURN_CREDIT)] * 2


@pytest.mark.parametrize("method", ["items", "async_items", "later"])
def test_what_ends_with_no_single_reply_has_its_credit_returned(proc: FakeProc, method: str) -> None:
    result = getattr(mesh_of(Counter, dp=1), method).call(7)

    assert [call[8] for [call] in proc.calls().values()] == [wire.RETURN_CREDIT]
    del result


def test_call_one_on_many_ranks_suggests_a_slice(proc: FakeProc) -> None:
    with pytest.raises(ValueError, match=r"4 ranks .*mesh\.slice\(hosts=0, gpus=0\)\.add\.call_one\(\.\.\.\)"):
        mesh_of(Counter, hosts=2, gpus=2).add.call_one(1)

    assert proc.calls() == {}


def test_an_empty_mesh_is_called_without_a_message(proc: FakeProc) -> None:
    add = mesh_of(Counter, dp=0).add

    assert list(add.call(1).get(timeout=0)) == []
    assert list(add.stream(1)) == []
    assert add.broadcast(1) is None
    with pytest.raises(ValueError, match="the mesh is empty"):
        add.choose(1)
    with pytest.raises(ValueError, match="0 ranks"):
        add.call_one(1)
    assert proc.ports == {}


def test_a_call_to_a_rank_that_is_gone_fails_and_a_broadcast_raises(proc: FakeProc) -> None:
    failure = MeshFailure(kind=FailureKind.EXITED, mesh="w", rank=1, host="h", exit_code=1)
    proc.gone["w.1"] = failure
    add = mesh_of(Counter, dp=2).add
    pending = [add.call(1), mesh_of(Counter, dp=2).slice(dp=1).add.call_one(1)]
    while proc.tasks:
        proc.tasks.pop(0)()

    for future in pending:
        assert isinstance(future.exception(timeout=0), SupervisionError)
    with pytest.raises(SupervisionError, match=r"counters\.add: mesh 'w' rank 1"):
        add.broadcast(1)
    assert proc.ports == {}


def test_an_argument_that_cannot_be_pickled_fails_at_the_call_with_the_reason(proc: FakeProc) -> None:
    for adverb in ("call", "broadcast", "stream", "call_one", "choose"):
        with pytest.raises(MessageError, match=r"counters\.add: an argument cannot be pickled here .*lock"):
            getattr(mesh_of(Counter, dp=1).add, adverb)(threading.Lock())

    assert proc.calls() == {}
    assert proc.ports == {}


def test_rref_is_refused_with_the_reason() -> None:
    with pytest.raises(TypeError, match="distributed tensors are not part of this version"):
        mesh_of(Counter, dp=1).add.rref(1)


# options


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_that_is_none_is_refused(timeout: float) -> None:
    with pytest.raises(ValueError, match=r"options\(timeout=.*expected seconds above zero"):
        mesh_of(Counter, dp=1).add.options(timeout=timeout)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"on_error": "last"}, 'expected "first" or "all"'),
        ({"reduce": "median"}, "expected one of sum, prod, min"),
        ({"reduce": "sum", "on_error": "all"}, "errors cannot be reduced"),
        ({"retries": 3}, "may run twice then; declare it @endpoint.idempotent=True"),
        ({"retries": -1}, "expected a number, 0 or more"),
        ({"retries": True}, "expected a number, 0 or more"),
    ],
)
def test_options_that_do_not_exist_or_fit_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        mesh_of(Counter, dp=1).add.options(**options)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        mesh_of(Counter, dp=1).add.options(priority=3)


def test_options_belong_to_the_endpoint_they_were_set_on() -> None:
    add = mesh_of(Counter, dp=1).add
    patient = add.options(timeout=5)

    assert (patient._options, add._options) == (CallOptions(timeout=5), CallOptions())


def test_a_call_with_a_timeout_fails_when_its_time_has_come(proc: FakeProc) -> None:
    future = mesh_of(Counter, dp=2).add.options(timeout=2.5).call(1)
    [(_, on_time)] = proc.timers
    on_time()

    with pytest.raises(
        CallTimeoutError, match=r"counters\.add: no reply within 2.5 s from counters rank 0, counters rank 1"
    ):
        future.get(timeout=0)
    assert [envelope[0] for _, envelope in proc.sent] == [wire.CANCEL] * 2


def test_a_call_that_was_answered_and_dropped_is_not_kept_until_its_time(proc: FakeProc) -> None:
    future = mesh_of(Counter, dp=1).add.options(timeout=1000).call_one(1)
    proc.ports.clear()
    del future
    [(_, on_time)] = proc.timers

    on_time()

    assert proc.sent == []


def test_reduce_may_be_given_at_the_call(proc: FakeProc) -> None:
    future = mesh_of(Counter, dp=1).add.call(1, reduce="sum")

    assert proc.arguments() == {"w.0": [((1,), {})]}
    assert future.gather.finish(ValueMesh(Extent.of(x=3), [1, 2, 3])) == 6
    with pytest.raises(ValueError, match="reduce='median'"):
        mesh_of(Counter, dp=1).add.call(1, reduce="median")


@pytest.mark.parametrize("adverb", ["call_one", "choose", "stream", "broadcast"])
def test_reduce_belongs_to_call_alone(proc: FakeProc, adverb: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'reduce'"):
        getattr(mesh_of(Counter, dp=1).add, adverb)(1, reduce="sum")
    with pytest.raises(TypeError, match=r"reduce= joins the values of call\(\)"):
        getattr(mesh_of(Counter, dp=1).add.options(reduce="sum"), adverb)(1)


def test_a_parameter_of_the_endpoint_wins_over_an_option_of_that_name(proc: FakeProc) -> None:
    own_words = mesh_of(Counter, dp=1).own_words
    own_words.call(reduce=3)
    own_words.choose(session=4)

    assert proc.arguments() == {"w.0": [((), {"reduce": 3}), ((), {"session": 4})]}


# scatter


def test_each_rank_gets_its_own_element_and_the_same_of_the_rest(proc: FakeProc) -> None:
    mesh_of(Counter, dp=3).add.call(scatter([10, 20, 30]), times=7)

    assert proc.arguments() == {f"w.{rank}": [((10 * (rank + 1),), {"times": 7})] for rank in range(3)}


def test_a_keyword_argument_can_be_scattered_and_several_at_once(proc: FakeProc) -> None:
    values = ValueMesh(Extent.of(dp=2), ["a", "b"])
    mesh_of(Counter, dp=2).add.call(scatter((1, 2)), times=scatter(values))

    assert proc.arguments() == {"w.0": [((1,), {"times": "a"})], "w.1": [((2,), {"times": "b"})]}


def test_what_scattered_messages_cost_is_counted_rank_by_rank(proc: FakeProc) -> None:
    future = mesh_of(Counter, dp=2).add.call(scatter(["x", "x" * 5000]))
    call = future.gather.call

    assert call.slot_sizes == [lane.account.spent_bytes for lane in call.lanes]
    assert call.slot_sizes[1] - call.slot_sizes[0] > 4000


def test_a_slice_is_scattered_to_in_its_own_rank_order(proc: FakeProc) -> None:
    mesh = mesh_of(Counter, hosts=2, gpus=2).slice(gpus=1)
    mesh.add.call(scatter(ValueMesh(Extent.of(hosts=2), ["a", "b"])))

    assert proc.arguments() == {"w.1": [(("a",), {})], "w.3": [(("b",), {})]}


@pytest.mark.parametrize(
    ("values", "error", "why"),
    [
        ([1], ValueError, r"argument 0\): 1 elements for 2 ranks .*one for each"),
        ([1, 2, 3], ValueError, "3 elements for 2 ranks"),
        (ValueMesh(Extent.of(a=2, b=1), [1, 2]), ValueError, "the ValueMesh has shape .*the called mesh"),
        (5, TypeError, r"scatter\(argument 0\): expected a list or a ValueMesh"),
    ],
)
def test_as_many_elements_as_ranks_are_needed(proc: FakeProc, values: Any, error: Any, why: str) -> None:
    with pytest.raises(error, match=why):
        mesh_of(Counter, dp=2).add.call(scatter(values))

    assert proc.calls() == {}
    assert proc.ports == {}


def test_a_scatter_inside_another_value_is_refused(proc: FakeProc) -> None:
    with pytest.raises(MessageError, match="has to be an argument of the call itself"):
        mesh_of(Counter, dp=2).add.call([scatter([1, 2])])


@UNHURRIED
@given(st.integers(0, 5), st.integers(0, 3), st.data())
def test_scattering_is_a_transposition(num_ranks: int, num_args: int, data: st.DataObject) -> None:
    extent = Extent.of(x=num_ranks)
    columns = [data.draw(st.lists(st.integers(), min_size=num_ranks, max_size=num_ranks)) for _ in range(num_args)]

    rows = scattered(tuple(map(scatter, columns)), {"same": 1}, extent, num_ranks)

    assert rows == [(tuple(column[rank] for column in columns), {"same": 1}) for rank in range(num_ranks)]


# reduction


def reduced(operation: Any, *values: Any) -> Any:
    return reducer(operation)(ValueMesh(Extent.of(x=len(values)), values))


@pytest.mark.parametrize(
    ("operation", "values", "result"),
    [
        ("sum", (1, 2, 4), 7),
        ("sum", ("a", "b"), "ab"),
        ("mean", (1, 2, 6), 3.0),
        ("prod", (2, 3, 4), 24),
        ("min", (3, 1, 2), 1),
        ("max", (3, 1, 2), 3),
        ("and", (True, False), False),
        ("or", (1, 6), 7),
        ("concat", ([1], [2, 3]), [1, 2, 3]),
        ("concat", ("a", "b"), "ab"),
        (lambda left, right: f"({left}{right})", ("a", "b", "c"), "((ab)c)"),
    ],
)
def test_plain_values_are_joined_in_rank_order(operation: Any, values: tuple[Any, ...], result: Any) -> None:
    assert reduced(operation, *values) == result


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("sum", [[5, 7], [9, 11]]),
        ("mean", [[2.5, 3.5], [4.5, 5.5]]),
        ("prod", [[4, 10], [18, 28]]),
        ("min", [[1, 2], [3, 4]]),
        ("max", [[4, 5], [6, 7]]),
        ("concat", [[1, 2], [3, 4], [4, 5], [6, 7]]),
    ],
)
@pytest.mark.parametrize("library", ["numpy", pytest.param("torch", marks=pytest.mark.torch)])
def test_arrays_and_tensors_are_joined_element_by_element(library: str, operation: str, expected: Any) -> None:
    make = np.array if library == "numpy" else pytest.importorskip("torch").tensor
    left, right = make([[1, 2], [3, 4]]), make([[4, 5], [6, 7]])

    assert reduced(operation, left, right).tolist() == expected
    assert left.tolist() == [[1, 2], [3, 4]]


def test_without_an_operation_the_values_stay_apart() -> None:
    assert reduced(None, 1, 2) == ValueMesh(Extent.of(x=2), [1, 2])


def test_one_value_is_its_own_sum() -> None:
    assert reduced("sum", 5) == 5


def test_an_operation_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"reduce='median': expected one of sum, .*concat, mean, or a function"):
        reducer("median")


# choice


def lanes_of(count: int) -> list[Lane]:
    return [Lane(FakeLink(f"w.{rank}"), "actor", "root", f"m rank {rank}", 100) for rank in range(count)]  # type: ignore[arg-type]


def test_of_two_ranks_the_less_loaded_is_chosen() -> None:
    lanes = lanes_of(2)
    lanes[0].account.spend(1)

    assert {pick(lanes, ()).proc for _ in range(50)} == {"w.1"}


def test_choosing_spreads_calls_evenly_where_nobody_answers() -> None:
    lanes = lanes_of(8)
    for _ in range(8 * 50):
        pick(lanes, ()).account.spend(1)

    loads = [lane.account.under_way for lane in lanes]
    assert max(loads) - min(loads) <= 20


def test_the_dead_are_not_chosen_while_anyone_lives() -> None:
    lanes = lanes_of(3)

    assert {pick(lanes, {"w.0", "w.2"}).proc for _ in range(20)} == {"w.1"}
    assert {pick(lanes, {"w.1"}, session).proc for session in range(100)} == {"w.0", "w.2"}


def test_where_all_are_dead_the_first_is_chosen_and_says_so() -> None:
    lanes = lanes_of(2)

    assert pick(lanes, {"w.0", "w.1"}) is lanes[0]
    assert pick(lanes, {"w.0", "w.1"}, "session") is lanes[0]


@pytest.mark.parametrize("session", ["user", 7, ("a", 1), 0, "", False])
def test_a_session_stays_on_its_rank_whatever_the_load(session: Any) -> None:
    lanes = lanes_of(5)
    first = pick(lanes, (), session)
    first.account.spend(1)

    assert {pick(lanes, (), session).proc for _ in range(20)} == {first.proc}


@UNHURRIED
@given(st.integers(2, 8), st.data())
def test_a_death_moves_only_the_sessions_of_the_dead_rank(num_ranks: int, data: st.DataObject) -> None:
    lanes = lanes_of(num_ranks)
    dead: set[str] = set()
    where = {session: pick(lanes, dead, session).proc for session in range(60)}
    for victim in data.draw(st.permutations(range(num_ranks)))[:-1]:
        dead.add(f"w.{victim}")
        now = {session: pick(lanes, dead, session).proc for session in range(60)}

        assert {session for session in where if now[session] != where[session]} == {
            session for session, proc in where.items() if proc == f"w.{victim}"
        }
        where = now


def test_sessions_spread_over_the_ranks() -> None:
    lanes = lanes_of(4)
    counts = [0] * 4
    for session in range(400):
        counts[lanes.index(pick(lanes, (), session))] += 1

    assert min(counts) > 60


def test_choose_sends_to_one_rank_alone(proc: FakeProc) -> None:
    mesh = mesh_of(Counter, dp=4)
    for _ in range(5):
        mesh.add.choose(1, session="user")

    [calls] = proc.calls().values()
    assert len(calls) == 5


def test_a_region_of_one_process_is_addressed_by_its_own_rank(proc: FakeProc) -> None:
    region = Region((), 3, (), ())
    mesh: Any = ActorMesh("counters", "key", Counter, ProcMesh("w", "w", region), region, 8)
    mesh.add.call_one(1)

    assert list(proc.calls()) == ["w.3"]
