"""The sinks of calls in flight, fed by hand: what completes a call, what fails it, who is told to stop."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danaus.runtime.calls.reduction import reducer
from danaus.runtime.calls.replies import Arrivals, Gather, OneReply, ask_all
from danaus.runtime.context import set_local_proc
from danaus.runtime.errors import (
    ActorError,
    CallCancelledError,
    CallTimeoutError,
    MessageError,
    StoppedError,
    SupervisionError,
)
from danaus.runtime.failure import FailureKind, MeshFailure, pack_failure
from danaus.runtime.messages import wire
from danaus.runtime.messages.attachment import Outgoing
from danaus.runtime.messages.link import Lane
from danaus.runtime.messages.payload import dump
from danaus.runtime.shapes.shape import Extent

from .fakes import SIZE_BYTES, FakeLink, FakeProc, Fed, ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A busy machine is no reason to fail.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def gathering(
    procs: list[str], *, on_error: str = "first", finish: Callable[[Any], Any] | None = None
) -> tuple[Fed, Gather]:
    fed = Fed(procs)
    region = Extent.of(dp=len(procs)).region
    return fed, fed.listen(Gather(fed.call, region, on_error=on_error, finish=finish or reducer(None)))  # type: ignore[arg-type]


# one reply


def one_call() -> tuple[Fed, OneReply[Any]]:
    fed = Fed(ranks(1))
    return fed, fed.listen(OneReply(fed.call))


def test_one_reply_is_the_value_and_ends_the_call() -> None:
    fed, future = one_call()
    fed.reply(0, {"loss": 0.5})

    assert future.get(timeout=0) == {"loss": 0.5}
    assert not fed.is_listening
    assert fed.under_way() == [(0, 0)]


def test_one_call_fails_with_the_error_of_its_rank() -> None:
    fed, future = one_call()
    fed.fail(0, ValueError("no"))

    with pytest.raises(ActorError, match="no") as told:
        future.get(timeout=0)
    assert isinstance(told.value.exception, ValueError)


def test_one_call_fails_with_the_death_of_its_process() -> None:
    fed, future = one_call()
    failure = fed.proc.die("w.0")

    with pytest.raises(SupervisionError, match=r"m\.f: mesh 'm' rank 0 .* was killed by SIGKILL") as told:
        future.get(timeout=0)
    assert (told.value.failure, told.value.endpoint) == (failure, "m.f")
    assert not fed.is_listening


def test_one_call_to_a_stopped_process_fails_with_that() -> None:
    fed, future = one_call()
    fed.proc.die("w.0", FailureKind.STOPPED)

    assert isinstance(future.exception(timeout=0), StoppedError)


def test_the_death_of_another_process_leaves_a_call_alone() -> None:
    fed, future = one_call()
    fed.proc.die("w.7")

    assert not future.done()
    assert fed.is_listening


def test_a_call_that_times_out_names_its_rank_and_is_called_off() -> None:
    fed, future = one_call()
    future.on_timeout(2.5)

    with pytest.raises(CallTimeoutError, match=r"m\.f: no reply within 2.5 s from m rank 0"):
        future.get(timeout=0)
    assert fed.proc.sent == [("w.0", [wire.CANCEL, "actor", "me.0", fed.call.port, 2.5])]
    assert not fed.is_listening
    assert fed.under_way() == [(0, 0)]


def test_a_timeout_after_the_reply_changes_nothing() -> None:
    fed, future = one_call()
    fed.reply(0, 7)
    future.on_timeout(2.5)

    assert future.get(timeout=0) == 7
    assert fed.proc.sent == []
    assert fed.under_way() == [(0, 0)]


def test_a_cancelled_call_tells_the_actor_and_hears_no_reply() -> None:
    fed, future = one_call()
    assert future.cancel()
    fed.reply(0, 7)

    assert isinstance(future.exception(timeout=0), CallCancelledError)
    assert fed.proc.cancelled() == ["w.0"]
    assert fed.under_way() == [(0, 0)]


def test_cancelling_a_call_that_waits_for_room_takes_it_back_and_tells_nobody() -> None:
    fed, future = one_call()
    [lane] = fed.lanes
    while lane.account.has_room():
        lane.account.spend(0)
    out = Outgoing(b"body")
    lane.post_later(fed.call.port, wire.pack([wire.CANCEL, "a", "b", 1, 0.0]), out)

    future.cancel()

    assert fed.proc.sent == []
    assert fed.proc.taken_back == [(out, "w.0")]
    assert not lane.backlog


def test_a_reply_that_cannot_be_loaded_fails_its_call_alone() -> None:
    fed, future = one_call()
    fed.proc.feed(fed.call.port, 0, wire.OK, b"no pickle")

    assert isinstance(future.exception(timeout=0), MessageError)


def test_a_reply_of_an_actor_that_is_gone_is_its_failure() -> None:
    fed, future = one_call()
    failure = MeshFailure(kind=FailureKind.INIT_ERROR, mesh="m", rank=0, host="h", traceback="ValueError: no")
    fed.proc.feed(fed.call.port, 0, wire.GONE, pack_failure(failure))

    with pytest.raises(SupervisionError, match=r"failed \(init error\): ValueError: no"):
        future.get(timeout=0)


# a call to many ranks


def test_replies_in_any_order_become_values_in_rank_order() -> None:
    fed, gather = gathering(ranks(4))
    for slot in (2, 0, 3):
        fed.reply(slot, slot * 10)
        assert not gather.future.done()
    fed.reply(1, 10)

    values = gather.future.get(timeout=0)

    assert list(values) == [0, 10, 20, 30]
    assert values.extent == Extent.of(dp=4)
    assert not fed.is_listening
    assert fed.under_way() == [(0, 0)] * 4
    assert fed.proc.sent == []


def test_the_first_error_fails_the_call_at_once_and_calls_off_those_still_missing() -> None:
    fed, gather = gathering(ranks(4))
    fed.reply(2, 20)
    fed.fail(1, ValueError("no"))

    assert isinstance(gather.future.exception(timeout=0), ActorError)
    assert fed.proc.cancelled() == ["w.0", "w.3"]
    assert not fed.is_listening
    assert fed.under_way() == [(0, 0)] * 4


def test_the_error_that_came_first_is_the_one_that_is_raised() -> None:
    fed, gather = gathering(ranks(3))
    fed.fail(2, KeyError("first"))
    fed.fail(0, ValueError("second"))
    fed.proc.die("w.1")

    with pytest.raises(ActorError, match="first"):
        gather.future.get(timeout=0)


def test_a_death_fails_the_call_at_once_and_the_dead_are_told_nothing() -> None:
    fed, gather = gathering(["w.0", "w.1", "w.1", "w.2"])
    fed.reply(0, 0)
    fed.proc.die("w.1")

    assert isinstance(gather.future.exception(timeout=0), SupervisionError)
    assert fed.proc.cancelled() == ["w.2"]
    assert not fed.is_listening


def test_a_death_after_all_the_dead_process_owed_is_no_failure() -> None:
    fed, gather = gathering(ranks(2))
    fed.reply(0, 0)
    fed.proc.die("w.0")
    assert not gather.future.done()

    fed.reply(1, 1)

    assert list(gather.future.get(timeout=0)) == [0, 1]


def test_on_error_all_waits_for_every_outcome_and_gives_errors_as_values() -> None:
    fed, gather = gathering(["w.0", "w.1", "w.2", "w.3", "w.3"], on_error="all")
    fed.fail(1, ValueError("no"))
    fed.proc.die("w.3")
    fed.proc.feed(fed.call.port, 2, wire.OK, b"no pickle")
    assert not gather.future.done()
    assert fed.proc.sent == []

    fed.reply(0, "fine")

    values = gather.future.get(timeout=0)
    kinds = ["str", "ActorError", "MessageError", "SupervisionError", "SupervisionError"]
    assert [type(value).__name__ for value in values] == kinds
    assert not fed.is_listening


def test_a_second_reply_of_a_rank_is_ignored() -> None:
    fed, gather = gathering(ranks(2))
    fed.reply(0, "first")
    fed.reply(0, "second")
    assert not gather.future.done()
    fed.reply(1, "other")

    assert list(gather.future.get(timeout=0)) == ["first", "other"]
    assert fed.under_way() == [(0, 0)] * 2


@pytest.mark.parametrize("on_error", ["first", "all"])
def test_a_timeout_names_the_missing_ranks_and_calls_off_only_those(on_error: str) -> None:
    fed, gather = gathering(ranks(4), on_error=on_error)
    fed.reply(2, 20)
    fed.reply(0, 0)
    gather.on_timeout(1.5)

    with pytest.raises(CallTimeoutError) as told:
        gather.future.get(timeout=0)
    assert told.value.missing == ("m rank 1", "m rank 3")
    assert told.value.timeout_s == 1.5
    assert fed.proc.cancelled() == ["w.1", "w.3"]
    assert not fed.is_listening
    assert fed.under_way() == [(0, 0)] * 4


def test_a_timeout_after_the_end_of_a_call_changes_nothing() -> None:
    fed, gather = gathering(ranks(2))
    fed.reply(0, 0)
    fed.fail(1, ValueError("no"))
    gather.on_timeout(1.5)

    assert isinstance(gather.future.exception(timeout=0), ActorError)
    assert fed.proc.sent == []


def test_cancelling_calls_off_only_the_missing_ranks() -> None:
    fed, gather = gathering(ranks(3))
    fed.reply(1, 10)

    assert gather.future.cancel()

    assert fed.proc.cancelled() == ["w.0", "w.2"]
    assert not fed.is_listening
    assert isinstance(gather.future.exception(timeout=0), CallCancelledError)
    assert not gather.future.cancel()
    assert len(fed.proc.sent) == 2
    assert fed.under_way() == [(0, 0)] * 3


def test_credit_comes_back_with_each_reply_by_what_its_message_cost() -> None:
    fed, _ = gathering(ranks(2))
    fed.call.slot_sizes = [SIZE_BYTES, 5000]
    fed.lanes[1].account.spent_bytes = 5000
    fed.reply(1, None)
    assert fed.under_way() == [(1, SIZE_BYTES), (0, 0)]

    fed.reply(0, None)
    assert fed.under_way() == [(0, 0), (0, 0)]


def test_replies_of_calls_that_pay_their_credit_back_themselves_return_none() -> None:
    fed = Fed(ranks(2), implied_credit=False)
    gather = fed.listen(Gather(fed.call, Extent.of(dp=2).region, on_error="first", finish=reducer(None)))  # type: ignore[arg-type]
    fed.reply(0, None)
    gather.future.cancel()

    assert fed.under_way() == [(1, SIZE_BYTES)] * 2


def test_the_result_is_reduced_on_the_thread_that_asks() -> None:
    threads: list[int] = []

    def add(left: int, right: int) -> int:
        threads.append(threading.get_ident())
        return left + right

    fed, gather = gathering(ranks(3), finish=reducer(add))
    feeder = threading.Thread(target=lambda: [fed.reply(slot, slot + 1) for slot in range(3)])
    feeder.start()
    feeder.join()

    assert gather.future.get(timeout=0) == 6
    assert set(threads) == {threading.get_ident()}


def test_values_are_loaded_when_they_are_looked_at() -> None:
    fed, gather = gathering(ranks(2))
    fed.reply(0, 0)
    fed.proc.feed(fed.call.port, 1, wire.OK, b"no pickle")

    values = gather.future.get(timeout=0)

    assert values.item(dp=0) == 0
    with pytest.raises(MessageError, match="could not be loaded here"):
        values.item(dp=1)


OUTCOMES = st.sampled_from(["value", "error", "death", "timeout", "cancel"])


def happen(fed: Fed, gather: Gather, event: str, slot: int) -> None:
    if event == "value":
        fed.reply(slot, slot)
    elif event == "error":
        fed.fail(slot, ValueError(str(slot)))
    elif event == "death" and f"w.{slot}" not in fed.proc.gone:
        fed.proc.die(f"w.{slot}")
    elif event == "timeout":
        gather.on_timeout(1.0)
    elif event == "cancel":
        gather.future.cancel()


@UNHURRIED
@given(st.sampled_from(["first", "all"]), st.lists(st.tuples(OUTCOMES, st.integers(0, 3)), max_size=14))
def test_whatever_comes_in_whatever_order_the_rules_of_a_call_hold(
    on_error: str, events: list[tuple[str, int]]
) -> None:
    fed, gather = gathering(ranks(4), on_error=on_error)
    outcomes: dict[int, str] = {}
    expected: str | None = None
    called_off: set[str] = set()
    for event, slot in events:
        happen(fed, gather, event, slot)
        if expected is None:
            if event in {"timeout", "cancel"}:
                expected = event
            else:
                outcomes.setdefault(slot, event)
                if on_error == "first" and outcomes[slot] != "value":
                    expected = outcomes[slot]
                elif len(outcomes) == 4:
                    expected = "all"
            if expected not in {None, "all"}:
                called_off = {f"w.{rank}" for rank in range(4) if rank not in outcomes}
        assert gather.future.done() is (expected is not None)
        assert fed.is_listening is (expected is None)

    names = {"error": "ActorError", "death": "SupervisionError", "value": "int"}
    names |= {"timeout": "CallTimeoutError", "cancel": "CallCancelledError"}
    assert set(fed.proc.cancelled()) == called_off
    assert len(fed.proc.sent) == len(called_off)
    if expected == "all":
        values = [type(value).__name__ for value in gather.future.get(timeout=0)]
        assert values == [names[outcomes[slot]] for slot in range(4)]
    elif expected is not None:
        assert type(gather.future.exception(timeout=0)).__name__ == names[expected]
    fed.proc.run_tasks()
    assert all(lane.account.returned <= 1 for lane in fed.lanes)


# ask_all


@pytest.fixture
def proc() -> Iterator[FakeProc]:
    """A fake process as the one that this code runs in."""
    fake = FakeProc()
    set_local_proc(fake)  # type: ignore[arg-type]
    yield fake
    set_local_proc(None)


def lanes_of(procs: list[str]) -> list[Lane]:
    return [Lane(FakeLink(proc), "actor", "root", f"m rank {rank}", 1) for rank, proc in enumerate(procs)]  # type: ignore[arg-type]


def test_asking_all_sends_one_message_to_each_and_is_there_with_the_last_answer(proc: FakeProc) -> None:
    lanes = lanes_of(ranks(3))
    future = ask_all(wire.STOP, "stop of 'm'", lanes, Extent.of(dp=3).region, on_error="all")
    [port] = proc.ports
    for slot, lane in enumerate(lanes):
        assert lane.link.sent == [[wire.STOP, "actor", "me.0", port, slot]]  # type: ignore[attr-defined]
        assert not future.done()
        proc.feed(port, slot, wire.OK, dump(None).body)

    assert future.get(timeout=0) is None
    assert proc.ports == {}


def test_asking_one_that_was_gone_before_fails_or_not_as_told(proc: FakeProc) -> None:
    proc.die("w.0")
    outcomes: list[str] = []
    for on_error in ("first", "all"):
        future = ask_all(
            wire.PING, "start of 'm'", lanes_of(ranks(1)), Extent.of(dp=1).region, on_error=on_error
        )  # fmt: skip
        proc.run_tasks()
        outcomes.append(type(future.exception(timeout=0)).__name__)

    assert outcomes == ["SupervisionError", "NoneType"]
    assert proc.ports == {}


def test_asking_nobody_is_done_at_once(proc: FakeProc) -> None:
    future = ask_all(wire.PING, "start of 'm'", [], Extent.of(dp=0).region, on_error="first")

    assert future.get(timeout=0) is None


def test_asking_all_may_time_out(proc: FakeProc) -> None:
    future = ask_all(
        wire.STOP, "stop of 'm'", lanes_of(ranks(2)), Extent.of(dp=2).region, on_error="all", timeout_s=3.0
    )
    [(_, on_time)] = proc.timers
    proc.feed(next(iter(proc.ports)), 0, wire.OK, dump(None).body)
    on_time()

    with pytest.raises(CallTimeoutError, match=r"stop of 'm': no reply within 3 s from m rank 1"):
        future.get(timeout=0)


# stream


def streaming(procs: list[str]) -> tuple[Fed, Arrivals[Any]]:
    fed = Fed(procs)
    return fed, fed.listen(Arrivals(fed.call))


def test_a_stream_gives_values_in_order_of_arrival() -> None:
    fed, arrivals = streaming(ranks(3))
    for slot in (2, 0, 1):
        fed.reply(slot, slot)

    assert [future.get(timeout=0) for future in arrivals.futures] == [2, 0, 1]
    assert not fed.is_listening
    assert fed.under_way() == [(0, 0)] * 3


def test_in_a_stream_each_error_and_each_death_is_one_arrival() -> None:
    fed, arrivals = streaming(["w.0", "w.1", "w.2", "w.2"])
    fed.fail(1, ValueError("no"))
    fed.proc.die("w.2")
    assert [future.done() for future in arrivals.futures] == [True, True, True, False]
    fed.reply(0, "fine")

    kinds = [type(future.exception(timeout=0)).__name__ for future in arrivals.futures]
    assert kinds == ["ActorError", "SupervisionError", "SupervisionError", "NoneType"]
    assert not fed.is_listening
    assert fed.proc.sent == []


def test_in_a_stream_a_second_reply_of_a_rank_is_ignored() -> None:
    fed, arrivals = streaming(ranks(2))
    fed.reply(1, "first")
    fed.reply(1, "second")
    assert [future.done() for future in arrivals.futures] == [True, False]
    fed.reply(0, "other")

    assert [future.get(timeout=0) for future in arrivals.futures] == ["first", "other"]
    assert fed.under_way() == [(0, 0)] * 2


def test_a_stream_that_times_out_gives_what_came_and_names_the_rest() -> None:
    fed, arrivals = streaming(ranks(3))
    fed.reply(1, "came")
    arrivals.on_timeout(0.5)

    first, *rest = arrivals.futures
    assert first.get(timeout=0) == "came"
    for future in rest:
        with pytest.raises(CallTimeoutError) as told:
            future.get(timeout=0)
        assert told.value.missing == ("m rank 0", "m rank 2")
    assert fed.proc.cancelled() == ["w.0", "w.2"]
    assert not fed.is_listening
    assert fed.under_way() == [(0, 0)] * 3
