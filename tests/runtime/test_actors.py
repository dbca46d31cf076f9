"""What an actor is: made once on its own thread, found by its handles from anywhere, cleaned up at its end."""

# Endpoints here take and return anything, and some calls are wrong on purpose.
# pyright: reportAttributeAccessIssue=false, reportUnusedClass=false

from __future__ import annotations

import asyncio
import os
import pickle
import sys
import threading
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest

from danaus import (
    Actor,
    ActorError,
    Channel,
    FailureKind,
    HostMesh,
    MessageError,
    Port,
    ProcMesh,
    StoppedError,
    SupervisionError,
    concurrent_endpoint,
    context,
    current_actor_name,
    current_rank,
    current_size,
    endpoint,
    get_or_spawn_controller,
    this_host,
    this_proc,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# The workers of a test run cannot import this file by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

LIMIT_S = 15


class Plain(Actor):
    """Tells about itself, and asks others about themselves."""

    def __init__(self, value: Any = None, *, named: Any = None) -> None:
        self.value, self.named = value, named
        self.made_on = threading.get_ident()
        self.threads: set[int] = set()
        self.local = threading.local()
        self.local.made = True

    @endpoint
    def values(self) -> tuple[Any, Any]:
        return self.value, self.named

    @endpoint
    def pid(self) -> int:
        return os.getpid()

    @endpoint
    def thread(self) -> tuple[int, int, bool]:
        return threading.get_ident(), self.made_on, hasattr(self.local, "made")

    @endpoint
    async def thread_async(self) -> tuple[int, int, bool]:
        await asyncio.sleep(0)
        return threading.get_ident(), self.made_on, hasattr(self.local, "made")

    @endpoint
    def thread_of_generator(self) -> Iterator[int]:
        yield threading.get_ident()

    @endpoint
    def num_threads(self) -> int:
        return threading.active_count()

    @endpoint
    def me(self) -> dict[str, Any]:
        instance = context().actor_instance
        return {
            "rank": current_rank().rank,
            "point": dict(current_rank()),
            "size": current_size(),
            "name": current_actor_name(),
            "class": instance.class_name,
            "proc": instance.proc_id,
            "owner": context().owner,
            "message_rank": (context().message_rank.rank, dict(context().message_rank)),
        }

    @endpoint
    async def my_rank_later(self) -> tuple[int, int]:
        await asyncio.sleep(0)
        return current_rank().rank, context().message_rank.rank

    @endpoint
    def ask(self, other: Plain) -> Any:
        return list(other.values.call().get(timeout=LIMIT_S))

    @endpoint
    async def ask_async(self, other: Plain) -> Any:
        return list(await other.values.call())

    @endpoint
    def ask_all_of_mine(self) -> list[int]:
        """Call the whole own mesh but oneself; a call to oneself would wait for itself."""
        mesh, mine = context().mesh, current_rank().rank
        ranks = [rank for rank in range(len(mesh)) if rank != mine]
        return [mesh.slice(rank=rank).pid.call_one().get(timeout=LIMIT_S) for rank in ranks]

    @endpoint
    async def poke_myself(self) -> None:
        context().mesh.slice(rank=current_rank().rank).set.broadcast("poked")

    @endpoint
    def set(self, value: Any) -> None:
        self.value = value

    @concurrent_endpoint
    async def ask_myself(self) -> Any:
        return await context().mesh.slice(rank=current_rank().rank).values_async.call_one()

    @concurrent_endpoint
    async def values_async(self) -> Any:
        return self.value, self.named

    @endpoint
    def spawn_on(self, procs: ProcMesh, value: Any) -> Plain:
        return procs.spawn("from_inside", Plain, value)

    @endpoint
    def spawn_procs(self, count: int) -> list[tuple[int, Any]]:
        with this_host().spawn_procs({"inner": count}, name="inner") as procs:
            actors = procs.spawn("inner", Plain, "inner")
            pids = actors.pid.call().get(timeout=LIMIT_S)
            return list(zip(pids, [value for value, _ in actors.values.call().get(timeout=LIMIT_S)], strict=True))

    @endpoint
    def spawn_beside(self) -> tuple[int, int]:
        beside = this_proc().spawn("beside", Plain, "beside")
        return os.getpid(), beside.pid.call_one().get(timeout=LIMIT_S)

    @endpoint
    def send_to(self, port: Port[Any], *values: Any) -> None:
        for value in values:
            port.send(value)

    @endpoint
    def pass_on(self, handle: Any) -> Any:
        return handle

    @endpoint
    def singleton(self, name: str) -> int:
        counter = get_or_spawn_controller(name, Counter).get(timeout=LIMIT_S)
        return counter.add.call_one(1).get(timeout=LIMIT_S)


class Counter(Actor):
    def __init__(self, start: int = 0) -> None:
        self.count = start

    @endpoint
    def add(self, by: int) -> int:
        self.count += by
        return self.count

    @endpoint
    def pid(self) -> int:
        return os.getpid()


class Failing(Actor):
    def __init__(self, rank: int) -> None:
        if current_rank().rank == rank:
            raise ValueError(f"cannot be made on rank {rank}")

    @endpoint
    def ping(self) -> str:
        return "pong"


class Cleaned(Actor):
    """Writes what happens at its end to a file."""

    def __init__(self, path: str) -> None:
        self.path, self.thread = path, threading.get_ident()

    @endpoint
    def ping(self) -> None: ...

    @endpoint
    def fail(self) -> None:
        raise ValueError("fails")

    @concurrent_endpoint
    async def rest(self, inside: Port[None]) -> None:
        inside.send(None)
        try:
            await asyncio.sleep(60)
        finally:
            self.write("rested")

    def write(self, line: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def __cleanup__(self, exc: BaseException | None) -> None:
        self.write(f"{exc!r} {threading.get_ident() == self.thread}")


class CleanedAsync(Cleaned):
    async def __cleanup__(self, exc: BaseException | None) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        self.write(f"async {exc!r} {threading.get_ident() == self.thread}")


class CleanedBadly(Cleaned):
    def __cleanup__(self, exc: BaseException | None) -> None:
        super().__cleanup__(exc)
        raise RuntimeError("in cleanup")


@pytest.fixture(scope="module")
def procs() -> Iterator[ProcMesh]:
    with this_host().spawn_procs({"rank": 2}, name="actors") as procs:
        yield procs


@pytest.fixture(scope="module")
def grid() -> Iterator[ProcMesh]:
    with this_host().spawn_procs({"a": 2, "b": 2}, name="grid") as procs:
        yield procs


def test_init_gets_its_arguments_on_every_rank_before_the_first_endpoint(procs: ProcMesh) -> None:
    values = [1, 2]
    plain = procs.spawn("plain", Plain, values, named={"k": "v"})
    values.append(3)

    assert list(plain.values.call().get(timeout=LIMIT_S)) == [([1, 2], {"k": "v"})] * 2
    assert plain.initialized.get(timeout=LIMIT_S) is None


def test_bad_spawns_are_refused_at_the_call(procs: ProcMesh) -> None:
    with pytest.raises(TypeError, match=r"Plain.*unexpected keyword argument 'other'"):
        procs.spawn("plain", Plain, other=1)
    with pytest.raises(TypeError, match=r"Failing.*missing.*rank"):
        procs.spawn("failing", Failing)
    with pytest.raises(TypeError, match=r"derived from danaus\.Actor"):
        procs.spawn("dict", dict)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="name"):
        procs.spawn(Plain, "plain")  # type: ignore[arg-type]
    with pytest.raises(MessageError, match=r"spawn of 'plain'.*cannot be pickled"):
        procs.spawn("plain", Plain, threading.Lock())
    with pytest.raises(ValueError, match="mailbox"):
        procs.spawn("plain", Plain, mailbox=0)


def test_bad_definitions_are_refused_when_written_or_spawned(procs: ProcMesh) -> None:
    with pytest.raises(ValueError, match="a sync endpoint has one thread"):

        class Sync(Actor):
            @endpoint(concurrency=2)
            def work(self) -> None: ...

    with pytest.raises(TypeError, match="one decorator"):

        class Twice(Actor):
            @concurrent_endpoint
            @endpoint
            async def work(self) -> None: ...

    class Colliding(Actor):
        @endpoint
        def slice(self) -> None: ...  # type: ignore[override]

    with pytest.raises(ValueError, match=r"Colliding\.slice.*rename"):
        procs.spawn("colliding", Colliding)


def test_init_that_raises_fails_that_rank_alone_and_says_why(procs: ProcMesh) -> None:
    failing = procs.spawn("failing", Failing, 1)

    for future in (failing.slice(rank=1).ping.call_one(), failing.initialized, failing.ping.call()):
        error = future.exception(timeout=LIMIT_S)
        assert isinstance(error, SupervisionError)
        failure = error.failure
        assert (failure.kind, failure.mesh, failure.rank) == (FailureKind.INIT_ERROR, "failing", 1)
        assert "ValueError: cannot be made on rank 1" in str(error)
        assert "in __init__" in failure.traceback
    assert failing.slice(rank=0).ping.call_one().get(timeout=LIMIT_S) == "pong"
    assert list(procs.spawn("plain", Plain).pid.call().get(timeout=LIMIT_S))


def test_broadcast_to_an_actor_that_could_not_be_made_does_not_disturb(procs: ProcMesh) -> None:
    failing = procs.spawn("failing", Failing, 0)

    failing.ping.broadcast()

    assert isinstance(failing.ping.call().exception(timeout=LIMIT_S), SupervisionError)


def test_inherited_endpoints_work_and_can_be_overridden(procs: ProcMesh) -> None:
    class Base(Actor):
        def __init__(self) -> None:
            self.made = ["base"]

        @endpoint
        def which(self) -> str:
            return "base"

        @concurrent_endpoint
        async def only_base(self) -> list[str]:
            return self.made

    class Mixin:
        @endpoint
        def mixed(self) -> str:
            return "mixin"

    class Derived(Mixin, Base):
        def __init__(self) -> None:
            super().__init__()
            self.made.append("derived")

        @endpoint
        async def which(self) -> str:  # type: ignore[override]
            return "derived"

    one = procs.slice(rank=0).spawn("derived", Derived)

    assert one.which.call_one().get(timeout=LIMIT_S) == "derived"
    assert one.only_base.call_one().get(timeout=LIMIT_S) == ["base", "derived"]
    assert one.mixed.call_one().get(timeout=LIMIT_S) == "mixin"
    base = procs.slice(rank=0).spawn("base", Base)
    assert base.which.call_one().get(timeout=LIMIT_S) == "base"


@pytest.mark.parametrize("number", [0, 1])
def test_actor_keeps_one_thread_for_its_whole_life(number: int) -> None:
    # The first actor of a process lives on its main thread, the next on a thread of its own.
    with this_host().spawn_procs({"rank": 1}, name="threads", preload=[]) as procs:
        one = [procs.spawn(f"plain{each}", Plain) for each in range(2)][number]
        calls = [one.thread, one.thread_async, one.thread, one.thread_async, one.thread]

        found = {call.call_one().get(timeout=LIMIT_S) for call in calls}
        assert len(found) == 1
        [(thread, made_on, has_local)] = found
        assert thread == made_on == next(one.thread_of_generator.call_one())
        assert has_local


def test_three_hundred_actors_live_in_one_process(procs: ProcMesh) -> None:
    proc = procs.slice(rank=0)
    before = proc.spawn("probe", Plain).num_threads.call_one().get(timeout=LIMIT_S)

    actors = [proc.spawn(f"actor{number}", Plain, number) for number in range(300)]
    futures = [actor.values.call_one() for actor in actors]

    assert [future.get(timeout=LIMIT_S)[0] for future in futures] == list(range(300))
    for stopped in [actor.stop() for actor in actors]:
        stopped.get(timeout=LIMIT_S)
    probe = proc.spawn("probe", Plain)
    # Threads end with their actors; a few may be on their way out.
    assert probe.num_threads.call_one().get(timeout=LIMIT_S) < before + 20


def test_actors_of_one_process_run_side_by_side(procs: ProcMesh) -> None:
    class Waiter(Actor):
        @endpoint
        def wait(self, inside: Port[Port[Any]]) -> Any:
            port, receiver = Channel.open()
            inside.send(port)
            return receiver.recv().get(timeout=30)

    proc = procs.slice(rank=0)
    waiters = [proc.spawn(f"waiter{number}", Waiter) for number in range(3)]
    port, receiver = Channel.open()

    futures = [waiter.wait.call_one(port) for waiter in waiters]
    releases = [receiver.recv().get(timeout=LIMIT_S) for _ in waiters]

    for release in releases:
        release.send("let go")
    assert [future.get(timeout=LIMIT_S) for future in futures] == ["let go"] * 3


def test_context_tells_an_actor_who_and_where_it_is(grid: ProcMesh) -> None:
    plain = grid.spawn("plain", Plain)

    found = plain.me.call().get(timeout=LIMIT_S)

    assert [me["rank"] for me in found] == [0, 1, 2, 3]
    assert [me["point"] for me in found] == [{"a": a, "b": b} for a in range(2) for b in range(2)]
    first = found.item(a=0, b=0)
    assert (first["size"], first["name"], first["class"]) == ({"a": 2, "b": 2}, "plain", "Plain")
    assert first["owner"] == context().actor_instance.actor_id
    assert len({me["proc"] for me in found}) == 4


def test_ranks_in_a_slice_are_rebased_for_the_message_and_not_for_the_actor(grid: ProcMesh) -> None:
    plain = grid.spawn("plain", Plain)

    found = list(plain.slice(a=1).me.call().get(timeout=LIMIT_S))
    assert [(me["rank"], me["message_rank"]) for me in found] == [(2, (0, {"b": 0})), (3, (1, {"b": 1}))]

    [column] = plain.slice(a=slice(1, 2), b=1).me.call().get(timeout=LIMIT_S)
    assert (column["rank"], column["message_rank"]) == (3, (0, {"a": 0}))
    one = plain.slice(a=1, b=0).me.call_one().get(timeout=LIMIT_S)
    assert (one["rank"], one["message_rank"]) == (2, (0, {}))
    assert list(plain.slice(a=1).my_rank_later.call().get(timeout=LIMIT_S)) == [(2, 0), (3, 1)]


def test_actors_spawned_on_a_slice_count_their_ranks_within_it(grid: ProcMesh) -> None:
    plain = grid.slice(a=1).spawn("plain", Plain)

    found = list(plain.me.call().get(timeout=LIMIT_S))

    assert [(me["rank"], me["point"], me["size"]) for me in found] == [(0, {"b": 0}, {"b": 2}), (1, {"b": 1}, {"b": 2})]


def test_context_of_the_script_is_that_of_the_root() -> None:
    assert (dict(current_rank()), current_size(), current_actor_name()) == ({}, {}, "root")
    with pytest.raises(RuntimeError, match="outside of an actor"):
        _ = context().mesh


@pytest.mark.parametrize("method", ["ask", "ask_async"])
def test_meshes_slices_and_single_actors_can_be_called_by_other_actors(procs: ProcMesh, method: str) -> None:
    asker, asked = procs.spawn("asker", Plain), procs.spawn("asked", Plain, "value")
    one = getattr(asker.slice(rank=0), method)

    assert one.call_one(asked).get(timeout=LIMIT_S) == [("value", None)] * 2
    assert one.call_one(asked.slice(rank=slice(1, 2))).get(timeout=LIMIT_S) == [("value", None)]
    assert one.call_one(asked.slice(rank=1)).get(timeout=LIMIT_S) == [("value", None)]


def test_handle_works_in_other_actors_before_what_it_names_is_up(procs: ProcMesh) -> None:
    asker = procs.slice(rank=0).spawn("asker", Plain)
    with this_host().spawn_procs({"late": 2}, name="late", preload=[]) as late:
        asked = late.spawn("asked", Plain, "late")
        assert asker.ask.call_one(asked).get(timeout=LIMIT_S) == [("late", None)] * 2

    with this_host().spawn_procs({"late": 1}, name="late", preload=[]) as late:
        inside = asker.spawn_on.call_one(late, "spawned").get(timeout=LIMIT_S)
        assert list(inside.values.call().get(timeout=LIMIT_S)) == [("spawned", None)]


def test_handles_come_back_equal_and_usable(procs: ProcMesh) -> None:
    one = procs.slice(rank=0).spawn("one", Plain)
    asked = procs.spawn("asked", Plain, 5)
    for handle in (asked, asked.slice(rank=1), procs, procs.slice(rank=0)):
        back = one.pass_on.call_one(handle).get(timeout=LIMIT_S)
        assert back == handle
        assert repr(back) == repr(handle)
        assert pickle.loads(cloudpickle.dumps(handle)) == handle
    host = one.pass_on.call_one(this_host()).get(timeout=LIMIT_S)
    assert isinstance(host, HostMesh)
    assert one.pass_on.call_one(asked).get(timeout=LIMIT_S).values.call().get(timeout=LIMIT_S).item(rank=1) == (5, None)


def test_ports_carry_values_from_any_actor_in_order(procs: ProcMesh) -> None:
    plain = procs.spawn("plain", Plain)
    port, receiver = Channel.open()

    plain.send_to.call(port, *range(50)).get(timeout=LIMIT_S)

    values = [receiver.recv().get(timeout=LIMIT_S) for _ in range(100)]
    assert sorted(values) == sorted([*range(50)] * 2)
    port.exception(ValueError("sent"))
    error = receiver.recv().exception(timeout=LIMIT_S)
    assert isinstance(error, ActorError)
    assert isinstance(error.exception, ValueError)


def test_actor_calls_the_others_of_its_own_mesh_and_itself(procs: ProcMesh) -> None:
    plain = procs.spawn("plain", Plain, "mine")
    pids = list(plain.pid.call().get(timeout=LIMIT_S))

    asked = plain.slice(rank=0).ask_all_of_mine.call_one().get(timeout=LIMIT_S)
    assert asked == [pids[1]]
    one = plain.slice(rank=1)
    assert one.ask_myself.call_one().get(timeout=LIMIT_S) == ("mine", None)
    one.poke_myself.call_one().get(timeout=LIMIT_S)
    assert one.values.call_one().get(timeout=LIMIT_S) == ("poked", None)


def test_actors_spawn_procs_and_actors_of_their_own(procs: ProcMesh) -> None:
    plain = procs.spawn("plain", Plain)
    pids = list(plain.pid.call().get(timeout=LIMIT_S))

    inner = plain.slice(rank=0).spawn_procs.call_one(2).get(timeout=LIMIT_S)
    assert [value for _, value in inner] == ["inner", "inner"]
    assert not {pid for pid, _ in inner} & {*pids, os.getpid()}
    assert list(plain.spawn_beside.call().get(timeout=LIMIT_S)) == [(pid, pid) for pid in pids]


def test_controllers_singleton_is_one_for_all_callers(procs: ProcMesh) -> None:
    plain = procs.spawn("plain", Plain)

    counts = [
        *plain.singleton.call("counter").get(timeout=LIMIT_S),
        *plain.singleton.call("counter").get(timeout=LIMIT_S),
    ]

    counter = get_or_spawn_controller("counter", Counter, 1000).get(timeout=LIMIT_S)
    assert sorted(counts) == [1, 2, 3, 4]
    assert counter.add.call_one(0).get(timeout=LIMIT_S) == 4
    assert counter.pid.call_one().get(timeout=LIMIT_S) == os.getpid()
    other = get_or_spawn_controller("other", Counter, 10).get(timeout=LIMIT_S)
    assert other.add.call_one(0).get(timeout=LIMIT_S) == 10
    with pytest.raises(ActorError, match="belongs to Counter"):
        get_or_spawn_controller("counter", Plain).get(timeout=LIMIT_S)


def test_singleton_that_cannot_be_made_is_an_error_each_time(procs: ProcMesh) -> None:
    for _ in range(2):
        error = get_or_spawn_controller("failing", Failing, 0).exception(timeout=LIMIT_S)
        assert error is not None
        assert "cannot be made on rank 0" in str(error)


@pytest.mark.parametrize(("actor_class", "prefix"), [(Cleaned, ""), (CleanedAsync, "async ")])
def test_cleanup_runs_on_the_actors_thread_once_stopped(
    procs: ProcMesh, tmp_path: Path, actor_class: type[Cleaned], prefix: str
) -> None:
    path = tmp_path / "log"
    one = procs.slice(rank=0).spawn("cleaned", actor_class, str(path))
    one.ping.call_one().get(timeout=LIMIT_S)

    one.stop().get(timeout=LIMIT_S)
    one.stop().get(timeout=LIMIT_S)

    assert path.read_text() == f"{prefix}None True\n"


@pytest.mark.parametrize(("actor_class", "prefix"), [(Cleaned, ""), (CleanedAsync, "async ")])
def test_cleanup_gets_the_exception_that_failed_the_actor(
    procs: ProcMesh, tmp_path: Path, actor_class: type[Cleaned], prefix: str
) -> None:
    path = tmp_path / "log"
    one = procs.slice(rank=0).spawn("cleaned", actor_class, str(path))

    one.fail.broadcast()

    assert isinstance(one.ping.call_one().exception(timeout=LIMIT_S), SupervisionError)
    assert path.read_text() == f"{prefix}ValueError('fails') True\n"


def test_cleanup_that_raises_neither_hangs_nor_hides_the_stop(procs: ProcMesh, tmp_path: Path) -> None:
    path = tmp_path / "log"
    one = procs.slice(rank=0).spawn("cleaned", CleanedBadly, str(path))

    one.stop().get(timeout=LIMIT_S)

    assert path.read_text() == "None True\n"
    assert isinstance(one.ping.call_one().exception(timeout=LIMIT_S), StoppedError)


def test_concurrent_calls_are_over_before_the_cleanup(procs: ProcMesh, tmp_path: Path) -> None:
    path = tmp_path / "log"
    one = procs.slice(rank=0).spawn("cleaned", Cleaned, str(path))
    port, receiver = Channel.open()
    for _ in range(3):
        one.rest.call_one(port)
        receiver.recv().get(timeout=LIMIT_S)

    one.stop().get(timeout=LIMIT_S)

    assert path.read_text() == "rested\n" * 3 + "None True\n"


def test_stop_of_the_procs_cleans_their_actors_up(tmp_path: Path) -> None:
    paths = [tmp_path / f"log{number}" for number in range(3)]
    with this_host().spawn_procs({"rank": 1}, name="stopped", preload=[]) as procs:
        actors = [procs.spawn(f"cleaned{path.name}", Cleaned, str(path)) for path in paths]
        for actor in actors:
            actor.ping.call_one().get(timeout=LIMIT_S)

    assert [path.read_text() for path in paths] == ["None True\n"] * 3


def test_stop_comes_after_what_was_sent_before_it_and_ends_what_comes_later(procs: ProcMesh) -> None:
    one = procs.slice(rank=0).spawn("counter", Counter)
    before = [one.add.call_one(1) for _ in range(50)]

    stopped = one.stop("no longer needed")
    after = one.add.call_one(1)

    assert [future.get(timeout=LIMIT_S) for future in before] == list(range(1, 51))
    assert stopped.get(timeout=LIMIT_S) is None
    error = after.exception(timeout=LIMIT_S)
    assert isinstance(error, StoppedError)
    assert "already been stopped" in str(error)


def test_stop_of_a_slice_leaves_the_other_ranks_alone(procs: ProcMesh) -> None:
    counters = procs.spawn("counters", Counter)
    counters.slice(rank=0).stop().get(timeout=LIMIT_S)

    assert counters.slice(rank=1).add.call_one(1).get(timeout=LIMIT_S) == 1
    assert isinstance(counters.add.call(1).exception(timeout=LIMIT_S), StoppedError)


def test_what_an_actor_had_spawned_ends_with_the_actor(procs: ProcMesh, tmp_path: Path) -> None:
    class Owner(Actor):
        @endpoint
        def own(self, path: str) -> tuple[Cleaned, ProcMesh]:
            self.procs = this_host().spawn_procs({"inner": 1}, name="owned", preload=[])
            self.cleaned = self.procs.spawn("cleaned", Cleaned, path)
            self.cleaned.ping.call_one().get(timeout=LIMIT_S)
            return self.cleaned, self.procs

    path = tmp_path / "log"
    owner = procs.slice(rank=0).spawn("owner", Owner)
    cleaned, _ = owner.own.call_one(str(path)).get(timeout=LIMIT_S)

    owner.stop().get(timeout=LIMIT_S)

    assert path.read_text() == "None True\n"
    assert isinstance(cleaned.ping.call_one().exception(timeout=LIMIT_S), StoppedError)
