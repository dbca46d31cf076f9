"""Process groups whose members die: survivors are released, callers hear of the killed rank, the group forms again."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest

torch: Any = pytest.importorskip("torch")
dist: Any = pytest.importorskip("torch.distributed")

from danaus import (  # noqa: E402
    Actor,
    ActorError,
    GroupBroken,
    Restart,
    SupervisionError,
    context,
    current_rank,
    device_mesh,
    endpoint,
    process_group,
    this_host,
)
from danaus.runtime.collectives.groups import break_group, generation, on_reformed  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [pytest.mark.torch, pytest.mark.timeout(60)]

LIMIT_S = 30.0
RELEASE_S = 5.0
AGAIN = Restart(max_restarts=1000)


class Member(Actor):
    """Runs whatever a test sends it, and may keep its group for good, as FSDP2 does."""

    def __init__(self, keeps_group: bool = False) -> None:
        self.kept: Any = {}
        self.rejoined: list[int] = []
        if keeps_group:
            self.kept["group"] = process_group("dp")
            on_reformed(self.kept["group"], self.rejoined.append)

    @endpoint
    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    @endpoint
    async def do_async(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    @endpoint
    def with_kept(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.kept, *args)

    @endpoint
    def told(self) -> list[int]:
        return self.rejoined


def spawn(size: int | dict[str, int], *, restart: Restart | None = None, name: str = "crew") -> Any:
    dims = {"dp": size} if isinstance(size, int) else size
    preload = ("torch", "torch.distributed.fsdp")
    return this_host().spawn_procs(dims, name=name, preload=preload, restart=restart)


def do(actors: Any, function: Callable[..., Any], *args: Any) -> list[Any]:
    return list(actors.do.options(timeout=LIMIT_S).call(function, *args).get().values())


def until_back(call: Callable[[], Any]) -> list[Any]:
    """Make ``call`` again and again while a lost rank is to be started again."""
    limit_s = time.monotonic() + LIMIT_S
    while True:
        try:
            return list(call().get(LIMIT_S).values())
        except SupervisionError as error:
            if not error.failure.restarts or time.monotonic() > limit_s:
                raise


def do_until_back(actors: Any, function: Callable[..., Any], *args: Any) -> list[Any]:
    return until_back(lambda: actors.do.options(timeout=LIMIT_S).call(function, *args))


def others_than(actors: Any, victim: int, size: int) -> list[Any]:
    """A slice for each other rank."""
    return [actors.slice(dp=rank) for rank in range(size) if rank != victim]


def total(group: Any = None) -> float:
    ones = torch.ones(1)
    dist.all_reduce(ones, group=process_group() if group is None else group)
    return ones.item()


def spin(kept: dict[str, Any]) -> None:
    """All-reduce until a member is lost."""
    while True:
        dist.all_reduce(torch.ones(1000), group=kept["group"])


def wait_in_vain(kept: dict[str, Any]) -> float:
    """Wait for a rank that never comes, and return when that ended."""
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.ones(1000), group=kept["group"])
    return time.monotonic()


# release:


@pytest.mark.parametrize(("size", "victim"), [(4, 0), (4, 2), (8, 7)])
def test_survivors_are_released_wherever_in_the_schedule_they_wait(size: int, victim: int) -> None:
    with spawn(size) as procs:
        actors: Any = procs.spawn("crew", Member)
        pids = list(actors.with_kept.call(keep_group).get(LIMIT_S).values())
        others = others_than(actors, victim, size)
        waiting = [each.with_kept.options(timeout=LIMIT_S).call_one(wait_in_vain) for each in others]
        do(actors.slice(dp=victim), os.getpid)
        killed_s = time.monotonic()

        os.kill(pids[victim], signal.SIGKILL)

        released_s = [future.get() - killed_s for future in waiting]
    assert max(released_s) < RELEASE_S, released_s


def test_groups_and_sockets_that_did_not_hold_the_killed_rank_go_on() -> None:
    def prepare(kept: dict[str, Any]) -> tuple[int, ...]:
        import socket

        kept["rows"], kept["columns"] = process_group("a"), process_group("b")
        with socket.create_server(("127.0.0.1", 0)) as server:
            kept["near"] = socket.create_connection(server.getsockname())
            kept["far"] = server.accept()[0]
        return current_rank()["a"], current_rank()["b"], os.getpid()

    def use(kept: dict[str, Any]) -> tuple[float, bytes]:
        kept["near"].sendall(b"still here")
        return total(kept["columns"]), kept["far"].recv(100)

    def close(kept: dict[str, Any]) -> None:
        kept["near"].close()
        kept["far"].close()

    def wait(kept: dict[str, Any]) -> float:
        with pytest.raises(RuntimeError):
            total(kept["rows"])
        return time.monotonic()

    with spawn({"a": 2, "b": 2}) as procs:
        actors: Any = procs.spawn("crew", Member)
        pids = {(a, b): pid for a, b, pid in actors.with_kept.call(prepare).get(LIMIT_S).values()}
        waiting = actors.slice(a=1, b=0).with_kept.options(timeout=LIMIT_S).call_one(wait)

        os.kill(pids[0, 0], signal.SIGKILL)

        waiting.get()
        healthy = actors.slice(a=1)
        assert list(healthy.with_kept.call(use).get(LIMIT_S).values()) == [(2.0, b"still here")] * 2
        healthy.with_kept.call(close).get(LIMIT_S)


# forming:


def die_once_published() -> None:
    """Have this process killed when the others know its address and it has connected to nobody."""
    from danaus.runtime.collectives.runtime_store import RuntimeStore

    publish = RuntimeStore.multi_set

    def publish_and_die(self: Any, keys: Any, values: Any) -> None:
        publish(self, keys, values)
        if any(key.startswith("gloo/") for key in keys):
            os.kill(os.getpid(), signal.SIGKILL)

    RuntimeStore.multi_set = publish_and_die


@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_death_while_the_group_forms_names_the_dead_rank_at_once(victim: int) -> None:
    with spawn(4) as procs:
        actors: Any = procs.spawn("crew", Member)
        do(actors.slice(dp=victim), die_once_published)
        waiting = [each.do.options(timeout=LIMIT_S).call_one(total) for each in others_than(actors, victim, 4)]
        since_s = time.monotonic()
        actors.slice(dp=victim).do.broadcast(total)

        errors = [future.exception(LIMIT_S) for future in waiting]

        took_s = time.monotonic() - since_s
    assert [type(error) for error in errors] == [SupervisionError] * 3
    assert {error.failure.rank for error in errors} == {victim}
    assert took_s < 3 * RELEASE_S


@pytest.mark.parametrize("victim", [0, 2])
def test_a_death_while_the_group_forms_starts_the_forming_after_it(victim: int) -> None:
    with spawn(4, restart=AGAIN) as procs:
        actors: Any = procs.spawn("crew", Member)
        do(actors.slice(dp=victim), die_once_published)
        waiting = [each.do.options(timeout=LIMIT_S).call_one(form) for each in others_than(actors, victim, 4)]
        with pytest.raises(SupervisionError):
            do(actors.slice(dp=victim), form)

        back = do_until_back(actors.slice(dp=victim), form)

        # Some were connected before the death and hear of it at their next use.
        assert back == [2]
        assert {future.get() for future in waiting} <= {1, 2}
        assert do(actors, total) == [4.0] * 4


def test_a_group_with_a_hole_is_refused_at_once_naming_the_rank() -> None:
    with spawn(3) as procs:
        actors: Any = procs.spawn("crew", Member)
        pids = do(actors, os.getpid)
        do(actors, total)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(SupervisionError):
            do(actors, total)

        since_s = time.monotonic()
        with pytest.raises(SupervisionError) as failed:
            do(actors.slice(dp=2), total)

        assert time.monotonic() - since_s < RELEASE_S
        assert (failed.value.failure.rank, failed.value.failure.pid) == (1, pids[1])


# root causes:


def form() -> int:
    return generation(process_group())


def keep_group(kept: dict[str, Any]) -> int:
    kept["group"] = process_group()
    return os.getpid()


def kill_one_of(actors: Any, rng: random.Random, *, whole: bool) -> None:
    """Kill a random rank in an all_reduce of all; check what the caller of all, or of the others alone, hears."""
    pids = until_back(lambda: actors.with_kept.options(timeout=LIMIT_S).call(keep_group))
    size, victim = len(pids), rng.randrange(len(pids))
    low, high = (victim + 1, size) if victim < size // 2 else (0, victim)
    parts = [actors] if whole else [actors.slice(dp=slice(low, high)), *(actors.slice(dp=rank) for rank in range(size))]
    calls = [part.with_kept.options(timeout=LIMIT_S).call(spin) for part in parts]
    timer = threading.Timer(rng.uniform(0.0, 0.03), os.kill, (pids[victim], signal.SIGKILL))
    timer.start()

    error = calls[0].exception(LIMIT_S)

    timer.join()
    for call in calls[1:]:
        call.exception(LIMIT_S)
    assert type(error) is SupervisionError, error
    assert (error.failure.rank, error.failure.pid, error.failure.signum) == (victim, pids[victim], signal.SIGKILL)


def check_root_causes(num_rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    with spawn(4, restart=AGAIN) as procs:
        actors: Any = procs.spawn("crew", Member)
        for index in range(num_rounds):
            kill_one_of(actors, rng, whole=index % 2 == 0)


def test_the_caller_hears_of_the_killed_rank_although_gloos_own_error_came_first() -> None:
    check_root_causes(6, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_caller_hears_of_the_killed_rank_100_times_of_100() -> None:
    seed = int(os.environ.get("DANAUS_SOAK_SEED") or random.randrange(1 << 30))
    print(f"seed {seed}: 100 kills in an all_reduce of 4 ranks")
    check_root_causes(100, seed)


def test_survivors_of_a_broadcast_are_not_lost_by_the_death_of_another() -> None:
    def who() -> tuple[int, int]:
        return os.getpid(), context().actor_instance.incarnation

    with spawn(3, restart=AGAIN) as procs:
        actors: Any = procs.spawn("crew", Member)
        before = do(actors, who)
        actors.with_kept.call(keep_group).get(LIMIT_S)
        actors.with_kept.broadcast(spin)

        os.kill(before[1][0], signal.SIGKILL)

        after = do_until_back(actors, who)
        assert (after[0], after[2]) == (before[0], before[2])
        assert after[1][1] == 1
        assert do_until_back(actors, total) == [3.0] * 3


def test_an_async_endpoint_hears_of_the_killed_rank_too() -> None:
    with spawn(2) as procs:
        actors: Any = procs.spawn("crew", Member)
        pids = list(actors.do_async.call(os.getpid).get(LIMIT_S).values())
        actors.do_async.call(total).get(LIMIT_S)
        waiting = actors.slice(dp=0).do_async.options(timeout=LIMIT_S).call_one(total)

        os.kill(pids[1], signal.SIGKILL)

        with pytest.raises(SupervisionError) as failed:
            waiting.get()
    assert failed.value.failure.pid == pids[1]
    assert "rank 0 of 'crew' lost it in a collective" in failed.value.failure.detail


def test_an_error_of_ones_own_stays_ones_own_though_a_member_has_died() -> None:
    def fail() -> None:
        raise RuntimeError("no such file")

    with spawn(2) as procs:
        actors: Any = procs.spawn("crew", Member)
        pids = do(actors, os.getpid)
        do(actors, total)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(SupervisionError):
            do(actors.slice(dp=0), total)

        with pytest.raises(ActorError, match="no such file"):
            do(actors.slice(dp=0), fail)


# generations:


def state(kept: dict[str, Any]) -> tuple[int, bool, int]:
    group = process_group()
    is_same = kept.setdefault("group", group) is group
    return generation(group), is_same, len(os.listdir("/proc/self/fd"))


def break_by_hand(rank: int) -> None:
    if current_rank().rank == rank:
        break_group(process_group(), "a test wants it")


def test_ten_generations_keep_the_object_and_leak_no_descriptor() -> None:
    with spawn(3) as procs:
        actors: Any = procs.spawn("crew", Member)
        seen: list[list[Any]] = []
        for index in range(11):
            do(actors, total)
            seen.append(list(actors.with_kept.call(state).get(LIMIT_S).values()))
            do(actors, break_by_hand, index % 3)
    assert {is_same for each in seen for _, is_same, _ in each} == {True}
    numbers = [each[0][0] for each in seen]
    assert numbers == sorted(set(numbers))
    assert [fds for _, _, fds in seen[-1]] == [fds for _, _, fds in seen[1]]


def few_renewals() -> None:
    from danaus.runtime.collectives import c10d

    setattr(c10d, "MAX_RENEWALS", 2)  # noqa: B010  a constant elsewhere


def test_a_group_goes_on_in_another_object_once_torch_has_no_numbers_left() -> None:
    with spawn(2) as procs:
        actors: Any = procs.spawn("crew", Member)
        do(actors, few_renewals)
        objects: list[bool] = []
        for _ in range(5):
            do(actors, total)
            objects.append(next(iter(actors.with_kept.call(state).get(LIMIT_S).values()))[1])
            do(actors, break_by_hand, 0)
    assert objects == [True, True, True, False, False]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_restarted_ranks_join_generation_after_generation_and_old_device_meshes_go_on() -> None:
    def setup(kept: dict[str, Any]) -> int:
        if "model" not in kept:
            from torch.distributed.fsdp import fully_shard

            torch.manual_seed(1)
            kept["mesh"], kept["model"] = device_mesh("dp"), torch.nn.Linear(6, 6)
            fully_shard(kept["model"], mesh=kept["mesh"])
        return os.getpid()

    def train(kept: dict[str, Any]) -> float:
        process_group("dp")
        loss = kept["model"](torch.ones(2, 6)).square().mean()
        loss.backward()
        gradients = kept["model"].weight.grad.full_tensor()
        return round(gradients.abs().sum().item(), 3)

    def step(actors: Any) -> list[float]:
        pids[:] = until_back(lambda: actors.with_kept.options(timeout=LIMIT_S).call(setup))
        return until_back(lambda: actors.with_kept.options(timeout=LIMIT_S).call(train))

    pids: list[int] = []
    with spawn(3, restart=AGAIN) as procs:
        actors: Any = procs.spawn("crew", Member)
        step(actors)
        for victim in (1, 0):
            os.kill(pids[victim], signal.SIGKILL)
            results = step(actors)
            assert len(set(results)) == 1


def test_an_idle_actor_that_keeps_its_group_joins_the_next_generation_by_itself() -> None:
    def reduce(kept: dict[str, Any]) -> float:
        return total(kept["group"])

    with spawn(3, restart=AGAIN) as procs:
        actors: Any = procs.spawn("crew", Member, keeps_group=True)
        for expected, victim in ((2, 1), (3, 0)):
            assert list(actors.with_kept.call(reduce).get(LIMIT_S).values()) == [3.0] * 3
            pids = do(actors, os.getpid)

            os.kill(pids[victim], signal.SIGKILL)

            do_until_back(actors, os.getpid)
            for survivor in others_than(actors, victim, 3):
                assert survivor.told.call_one().get(LIMIT_S)[-1] == expected
            assert list(actors.with_kept.call(reduce).get(LIMIT_S).values()) == [3.0] * 3


def test_a_busy_actor_joins_after_its_endpoint_and_keeps_nobodys_mailbox_waiting() -> None:
    def wait_for_file(path: str) -> None:
        limit_s = time.monotonic() + LIMIT_S
        while not os.path.exists(path):
            assert time.monotonic() < limit_s
            time.sleep(0.005)

    with spawn(3, restart=AGAIN) as procs:
        actors: Any = procs.spawn("crew", Member, keeps_group=True)
        pids = do(actors, os.getpid)
        path = f"/tmp/dt-busy-{os.getpid()}"
        busy = actors.slice(dp=2).do.options(timeout=LIMIT_S).call_one(wait_for_file, path)
        os.kill(pids[1], signal.SIGKILL)
        error = None
        while error is None:
            error = actors.slice(dp=1).do.call_one(os.getpid).exception(LIMIT_S)
        try:
            # The dead rank's next incarnation cannot be made before the busy one comes; the idle one answers.
            assert do(actors.slice(dp=0), os.getpid) == [pids[0]]
        finally:
            with open(path, "w"):
                pass
        busy.get()
        os.unlink(path)
        do_until_back(actors, os.getpid)
        assert actors.slice(dp=0).told.call_one().get(LIMIT_S) == [2]


def test_a_generation_ended_by_a_living_member_releases_the_others_and_says_why() -> None:
    def leave() -> None:
        break_group(process_group(), "rank 1 has an error of its own")

    with spawn(3) as procs:
        actors: Any = procs.spawn("crew", Member)
        do(actors, total)
        waiting = [each.do.options(timeout=LIMIT_S).call_one(total) for each in others_than(actors, 1, 3)]

        do(actors.slice(dp=1), leave)

        for future in waiting:
            error: Any = future.exception(LIMIT_S)
            assert isinstance(error, ActorError)
            assert isinstance(error.exception, GroupBroken)
            assert error.exception.old == 1
            assert "rank 1 has an error of its own" in str(error)
        assert do(actors, total) == [3.0] * 3


def test_an_actor_that_fails_releases_the_others_though_its_process_lives() -> None:
    def fail() -> None:
        raise ValueError("broken for good")

    with spawn(3) as procs:
        actors: Any = procs.spawn("crew", Member)
        do(actors, total)
        waiting = [each.do.options(timeout=LIMIT_S).call_one(total) for each in others_than(actors, 1, 3)]

        actors.slice(dp=1).do.broadcast(fail)

        for future in waiting:
            error: Any = future.exception(LIMIT_S)
            assert type(error) is SupervisionError
            assert "broken for good" in str(error)


def test_the_store_of_an_old_generation_takes_and_gives_nothing() -> None:
    def use_old_store(kept: dict[str, Any]) -> str:
        group = process_group()
        store = dist.distributed_c10d._world.pg_map[group][1]
        if "store" not in kept:
            kept["store"] = store
            store.set("mine", "1")
            return ""
        assert kept["store"] is not store
        assert not store.check(["mine"])
        with pytest.raises(dist.DistStoreError) as failed:
            kept["store"].set("mine", "2")
        return str(failed.value)

    with spawn(2) as procs:
        actors: Any = procs.spawn("crew", Member)
        actors.with_kept.call(use_old_store).get(LIMIT_S)
        do(actors, break_by_hand, 1)

        errors = list(actors.with_kept.call(use_old_store).get(LIMIT_S).values())

    assert all("generation 1 of the group has ended: a test wants it" in error for error in errors)
