"""Process groups and device meshes: torch's collectives along the dimensions of real meshes, against numpy."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import pytest

# Untyped: much of torch.distributed is missing in its stubs, or has another name there.
torch: Any = pytest.importorskip("torch")
dist: Any = pytest.importorskip("torch.distributed")
dcp: Any = pytest.importorskip("torch.distributed.checkpoint")

import danaus  # noqa: E402
from danaus import (  # noqa: E402
    Actor,
    ActorError,
    SupervisionError,
    context,
    current_rank,
    device_mesh,
    endpoint,
    process_group,
    this_host,
    this_proc,
)
from danaus.runtime.collectives.groups import ranks_along  # noqa: E402
from danaus.runtime.collectives.roll_call import Formed, Membership, NotFormed, RollCall  # noqa: E402
from danaus.runtime.collectives.store import Space  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# The workers of a test run cannot import this file by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [pytest.mark.torch, pytest.mark.timeout(60)]

LIMIT_S = 30.0
PRELOAD = ("torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")


class Member(Actor):
    """Runs whatever a test sends it."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    @endpoint
    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    @endpoint
    async def do_async(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    @endpoint
    def keep(self, *dims: str) -> None:
        self.kept.append(process_group(*dims))

    @endpoint
    def is_kept(self, *dims: str) -> bool:
        return process_group(*dims) is self.kept[-1]


def do(actors: Any, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run ``function`` on every rank at once and return what the ranks return, in rank order."""
    return list(actors.do.options(timeout=LIMIT_S).call(function, *args).get().values())


def fails(actors: Any, function: Callable[..., Any], *args: Any) -> list[BaseException]:
    """Same, where every rank raises: return what they raised."""
    errors = actors.do.options(timeout=LIMIT_S, on_error="all").call(function, *args).get().values()
    return [error.exception for error in errors]


@pytest.fixture(scope="module")
def square() -> Iterator[Any]:
    with this_host().spawn_procs({"a": 2, "b": 2}, name="square", preload=PRELOAD) as procs:
        yield procs.spawn("square", Member)


@pytest.fixture(scope="module")
def cube() -> Iterator[Any]:
    with this_host().spawn_procs({"a": 2, "b": 2, "c": 2}, name="cube", preload=PRELOAD) as procs:
        yield procs.spawn("cube", Member)


# which ranks are in a group:


def expected_groups(sizes: dict[str, int], dims: tuple[str, ...]) -> list[list[int]]:
    """For every rank, the members of its group along ``dims``, by numpy indexing."""
    labels = tuple(sizes)
    grid = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    groups: list[list[int]] = []
    for rank in range(grid.size):
        at = np.unravel_index(rank, grid.shape)
        index = tuple(slice(None) if label in dims else at[place] for place, label in enumerate(labels))
        part = grid[index]
        kept = [label for label in labels if label in dims]
        groups.append(part.transpose([kept.index(dim) for dim in dims]).ravel().tolist())
    return groups


@pytest.mark.parametrize("count", [1, 2, 3])
def test_members_are_the_ranks_that_share_every_other_coordinate_in_the_order_of_the_dimensions(count: int) -> None:
    sizes = {"a": 2, "b": 3, "c": 4}
    region = danaus.Extent.of(**sizes).region
    for dims in itertools.permutations(sizes, count):
        expected = expected_groups(sizes, dims)
        assert [list(ranks_along(region, rank, dims)) for rank in range(24)] == expected


def test_members_of_a_strided_slice_keep_the_ranks_of_the_procs() -> None:
    region = danaus.Extent.of(a=2, b=6).region.slice(b=slice(1, None, 2))

    assert ranks_along(region, 9, ("b",)) == (7, 9, 11)
    assert ranks_along(region, 9, ("a",)) == (3, 9)


# the roll call and the keys, without processes:


PLACES = ("p.0", "p.1", "p.2")


def membership(rank: int, *, proc: str = "", backend: str = "gloo", generation: int = 0) -> Membership:
    return Membership(
        group="g",
        rank=rank,
        places=PLACES,
        proc=proc or PLACES[rank],
        host="h",
        backend=backend,
        generation=generation,
    )


def test_a_roll_call_is_over_when_the_last_member_asks() -> None:
    roll = RollCall(PLACES)

    assert roll.arrive(membership(2)) is None
    assert roll.arrive(membership(0)) is None
    assert roll.missing() == (1,)
    assert roll.arrive(membership(1)) == Formed(1, tuple(map(membership, range(3))))


def test_a_generation_is_above_all_that_store_and_members_have_seen() -> None:
    roll = RollCall(PLACES, last_generation=2)

    outcomes = [roll.arrive(membership(rank, generation=rank * 3)) for rank in range(3)]

    assert isinstance(outcomes[-1], Formed)
    assert outcomes[-1].generation == 7


def test_a_member_that_dies_while_others_are_awaited_has_to_ask_again() -> None:
    roll = RollCall(PLACES)
    roll.arrive(membership(0))
    roll.arrive(membership(1))

    roll.withdraw("p.1")

    assert roll.arrive(membership(2)) is None
    assert roll.missing() == (1,)
    formed = roll.arrive(membership(1, proc="p.1~1"))
    assert isinstance(formed, Formed)
    assert [member.proc for member in formed.members] == ["p.0", "p.1~1", "p.2"]


def test_what_a_dead_incarnation_had_asked_for_does_not_displace_its_successor() -> None:
    roll = RollCall(PLACES)
    roll.arrive(membership(1, proc="p.1~2"))
    roll.arrive(membership(1, proc="p.1~1"))
    roll.arrive(membership(0))

    formed = roll.arrive(membership(2))

    assert isinstance(formed, Formed)
    assert formed.members[1].proc == "p.1~2"


def test_members_that_ask_for_other_backends_are_refused_at_once() -> None:
    roll = RollCall(PLACES)
    roll.arrive(membership(0))

    assert roll.arrive(membership(2, backend="nccl")) == NotFormed(backends=((0, "gloo"), (2, "nccl")))


def test_a_space_that_has_ended_says_why_to_everyone() -> None:
    space = Space(("p.0",))
    space.end("rank 0 is gone")

    with pytest.raises(RuntimeError, match="rank 0 is gone"):
        space.check()


# collectives:


def data_of(rank: int) -> np.ndarray:
    """What each rank of the mesh starts from."""
    return np.random.default_rng(rank).integers(0, 100, size=8).astype(np.float32)


def run_collectives(dims: tuple[str, ...], picked: dict[str, int]) -> dict[str, Any]:
    mesh = context().mesh
    group = (mesh.slice(**picked) if picked else mesh).process_group(*dims)
    size, place = group.size(), group.rank()
    own = torch.from_numpy(data_of(current_rank().rank))
    out: dict[str, Any] = {"ranks": dist.get_process_group_ranks(group), "place": place}

    summed = own.clone()
    dist.all_reduce(summed, group=group)
    out["all_reduce"] = summed.numpy()
    largest = own.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    out["max"] = largest.numpy()

    parts = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(parts, own, group=group)
    out["all_gather"] = torch.stack(parts).numpy()
    flat = torch.empty(size * 8)
    # The older names warn where there are newer ones.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(flat, own, group=group)
    out["all_gather_flat"] = flat.numpy()

    share = torch.empty(8 // size)
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(share, own, group=group)
    out["reduce_scatter"] = share.numpy()

    swapped = torch.empty_like(own)
    dist.all_to_all_single(swapped, own, group=group)
    out["all_to_all"] = swapped.numpy()

    told = own.clone()
    dist.broadcast(told, group_src=size - 1, group=group)
    out["broadcast"] = told.numpy()

    passed = torch.empty_like(own)
    sending = dist.isend(own, group_dst=(place + 1) % size, group=group)
    dist.recv(passed, group_src=(place - 1) % size, group=group)
    sending.wait()
    out["send_recv"] = passed.numpy()
    return out


def check_collectives(results: list[dict[str, Any]], groups: list[list[int]], ranks: list[int]) -> None:
    for rank, members, out in zip(ranks, groups, results, strict=True):
        place, size = members.index(rank), len(members)
        data = np.stack([data_of(member) for member in members])
        assert (out.pop("ranks"), out.pop("place")) == (members, place)
        expected = {
            "all_reduce": data.sum(0),
            "max": data.max(0),
            "all_gather": data,
            "all_gather_flat": data.ravel(),
            "reduce_scatter": data.sum(0).reshape(size, -1)[place],
            "all_to_all": data.reshape(size, size, -1)[:, place].ravel(),
            "broadcast": data[-1],
            "send_recv": data[place - 1],
        }
        assert out.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(out[name], value, err_msg=f"{name} on rank {rank} in {members}")


@pytest.mark.parametrize("dims", [("a",), ("b",), ("a", "b"), ("b", "a")])
def test_collectives_along_each_dimension_of_a_square_give_what_numpy_gives(square: Any, dims: tuple[str, ...]) -> None:
    results = do(square, run_collectives, dims, {})

    check_collectives(results, expected_groups({"a": 2, "b": 2}, dims), list(range(4)))


@pytest.mark.parametrize("dims", [("a",), ("b",), ("c",), ("a", "c"), ("b", "c"), ("a", "b", "c")])
def test_collectives_along_each_dimension_of_a_cube_give_what_numpy_gives(cube: Any, dims: tuple[str, ...]) -> None:
    results = do(cube, run_collectives, dims, {})

    check_collectives(results, expected_groups({"a": 2, "b": 2, "c": 2}, dims), list(range(8)))


def test_a_slice_forms_groups_of_its_own_members_alone(cube: Any) -> None:
    results = do(cube.slice(a=1), run_collectives, ("b", "c"), {"a": 1})

    check_collectives(results, [[4, 5, 6, 7]] * 4, [4, 5, 6, 7])


def test_a_slice_gives_the_same_group_as_the_whole_mesh_where_the_members_are_the_same(square: Any) -> None:
    def same() -> bool:
        mesh = context().mesh
        return mesh.slice(b=current_rank()["b"]).process_group("a") is mesh.process_group("a")

    assert do(square, same) == [True] * 4


def test_no_dimensions_mean_all_of_them(square: Any) -> None:
    assert do(square, lambda: process_group() is process_group("a", "b")) == [True] * 4


def test_the_same_call_in_another_message_gives_the_same_object(square: Any) -> None:
    square.keep.call("a").get(LIMIT_S)

    assert set(square.is_kept.call("a").get(LIMIT_S).values()) == {True}


def test_an_async_endpoint_may_form_a_group_too(square: Any) -> None:
    def total() -> float:
        ones = torch.ones(1)
        dist.all_reduce(ones, group=process_group("a", backend="gloo"))
        return ones.item()

    with _spawned(square) as other:
        assert list(other.do_async.call(total).get(LIMIT_S).values()) == [2.0] * 4


class _spawned:  # noqa: N801
    """More members on the same procs, stopped at the end."""

    def __init__(self, beside: Any, name: str = "other") -> None:
        self.actors = beside._procs.spawn(name, Member)

    def __enter__(self) -> Any:
        return self.actors

    def __exit__(self, *_exc: object) -> None:
        self.actors.stop().get(LIMIT_S)


def test_two_actors_of_a_proc_may_form_their_groups_in_opposite_orders(square: Any) -> None:
    def form(dims: tuple[str, ...]) -> int:
        return sum(process_group(dim).size() for dim in dims)

    with _spawned(square, "left") as left, _spawned(square, "right") as right:
        for dim, other in (("a", "b"), ("b", "a")):
            waiting = [
                actors.slice(**{dim: index}).do.options(timeout=LIMIT_S).call(form, order)
                for index, actors, order in (
                    (0, left, (dim, other)),
                    (1, right, (other, dim)),
                    (1, left, (dim, other)),
                    (0, right, (other, dim)),
                )
            ]
            assert [list(future.get().values()) for future in waiting] == [[4, 4]] * 4


def test_functional_collectives_find_the_group_by_its_name(square: Any) -> None:
    def total() -> list[float]:
        from torch.distributed._functional_collectives import all_reduce

        return all_reduce(torch.arange(2.0) + current_rank().rank, "sum", process_group("b")).tolist()

    assert do(square, total) == [[1, 3], [1, 3], [5, 7], [5, 7]]


def test_objects_travel_along_a_group(square: Any) -> None:
    def names() -> list[Any]:
        found: list[Any] = [None, None]
        dist.all_gather_object(found, f"rank {current_rank().rank}", group=process_group("a"))
        return found

    assert do(square, names) == [["rank 0", "rank 2"], ["rank 1", "rank 3"]] * 2


# device meshes: FSDP2, DTensor, DDP, checkpoints:


def make_model() -> Any:
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))


def batches(share: int, num_shares: int) -> list[Any]:
    """This share of each step's global batch of eight samples."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 8, generator=generator).chunk(num_shares)[share] for _ in range(3)]


def train(model: Any, share: int, num_shares: int, group: Any = None) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses: list[float] = []
    for batch in batches(share, num_shares):
        loss = (model(batch) - batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shown = loss.detach().clone()
        if group is not None:
            dist.all_reduce(shown, group=group)
            shown /= num_shares
        losses.append(shown.item())
    return losses


def check_losses(results: list[list[float]]) -> None:
    torch.set_num_threads(1)
    expected = train(make_model(), 0, 1)
    for losses in results:
        np.testing.assert_allclose(losses, expected, rtol=2e-6)


def test_a_device_mesh_has_the_dimensions_and_groups_of_the_actor_mesh(square: Any) -> None:
    def describe() -> tuple[Any, ...]:
        mesh = device_mesh("b", "a")
        is_same = mesh is device_mesh("b", "a") and mesh.get_group("a") is process_group("a")
        return mesh.mesh_dim_names, mesh.mesh.tolist(), mesh.get_coordinate(), mesh["a"].mesh.tolist(), is_same

    assert do(square, describe) == [
        (("b", "a"), [[0, 2], [1, 3]], coordinate, row, True)
        for coordinate, row in (((0, 0), [0, 2]), ((1, 0), [1, 3]), ((0, 1), [0, 2]), ((1, 1), [1, 3]))
    ]


def test_hybrid_sharded_fsdp2_trains_as_one_process_does(square: Any) -> None:
    def run() -> list[float]:
        from torch.distributed.fsdp import fully_shard

        model, mesh = make_model(), device_mesh("a", "b")
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        return train(model, current_rank().rank, 4, process_group())

    check_losses(do(square, run))


def test_fsdp2_with_tensor_parallel_layers_trains_as_one_process_does(square: Any) -> None:
    def run() -> list[float]:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        model, mesh = make_model(), device_mesh("a", "b")
        parallelize_module(model, mesh["b"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["a"])
        return train(model, current_rank()["a"], 2, process_group("a"))

    check_losses(do(square, run))


def test_ddp_trains_as_one_process_does_on_a_group_and_on_the_default_group(square: Any) -> None:
    def run(pass_group: bool) -> list[float]:
        from torch.nn.parallel import DistributedDataParallel

        group = process_group()
        model = DistributedDataParallel(make_model(), process_group=group if pass_group else None)
        return train(model, current_rank().rank, 4, group)

    check_losses(do(square, run, True))
    check_losses(do(square, run, False))


def test_dtensor_computes_and_redistributes_on_a_square(square: Any) -> None:
    def run() -> tuple[np.ndarray, np.ndarray]:
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = device_mesh()
        left: Any = distribute_tensor(torch.arange(32.0).reshape(4, 8), mesh, [Shard(0), Shard(1)])
        right = distribute_tensor(torch.arange(48.0).reshape(8, 6), mesh, [Replicate(), Shard(0)])
        product: Any = left @ right
        return product.full_tensor().numpy(), product.redistribute(mesh, [Shard(1), Shard(0)]).to_local().numpy()

    product = np.arange(32.0).reshape(4, 8) @ np.arange(48.0).reshape(8, 6)
    for rank, (full, local) in enumerate(do(square, run)):
        a, b = divmod(rank, 2)
        np.testing.assert_array_equal(full, product)
        np.testing.assert_array_equal(local, product[2 * b : 2 * b + 2, 3 * a : 3 * a + 3])


def test_a_sharded_checkpoint_is_written_and_loaded_without_naming_a_group(square: Any, tmp_path: Path) -> None:
    def run(path: str) -> bool:
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh, value = device_mesh(), torch.arange(64.0).reshape(8, 8)
        dcp.save({"w": distribute_tensor(value, mesh, [Shard(0), Shard(1)])}, checkpoint_id=path)
        loaded = {"w": distribute_tensor(torch.zeros(8, 8), mesh, [Shard(1), Shard(0)])}
        dcp.load(loaded, checkpoint_id=path)
        return torch.equal(loaded["w"].full_tensor(), value)

    assert do(square, run, str(tmp_path / "checkpoint")) == [True] * 4


def test_code_that_makes_groups_of_the_default_group_finds_one(square: Any) -> None:
    def run() -> tuple[float, ...]:
        mesh = device_mesh("a", "b")
        flat, halves = mesh._flatten("ab").get_group(), [dist.new_group([0, 1]), dist.new_group([2, 3])]
        dist.barrier()
        sums = [torch.ones(1), torch.ones(1)]
        for ones, group in zip(sums, (flat, halves[current_rank()["a"]]), strict=True):
            dist.all_reduce(ones, group=group)
        return dist.get_rank(), dist.get_world_size(), *(ones.item() for ones in sums)

    assert do(square, run) == [(rank, 4, 4.0, 2.0) for rank in range(4)]


def test_a_default_group_of_the_users_own_has_to_have_the_ranks_of_the_mesh() -> None:
    def disagree() -> Any:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return process_group("a")

    with this_host().spawn_procs({"a": 2}, name="pair", preload=PRELOAD) as procs:
        errors = fails(procs.spawn("pair", Member), disagree)
    assert "initialised here as rank 0 of 1, but this process is rank 1 of 2" in str(errors[1])


# the store:


def use_store() -> list[Any]:
    from danaus.runtime.collectives.runtime_store import RuntimeStore

    store = RuntimeStore(context().actor_instance.proc_id, "test", timeout_s=5.0)
    prefixed = dist.PrefixStore("p", store)
    prefixed.set("k", "v")
    prefixed.multi_set(["x", "y"], ["1", "2"])
    return [
        prefixed.get("k"),
        prefixed.multi_get(["x", "y"]),
        [prefixed.add("n", 2), prefixed.add("n", 3)],
        [prefixed.check(["k"]), prefixed.check(["k", "no"])],
        [prefixed.compare_set("k", "other", "w"), prefixed.compare_set("k", "v", "w"), prefixed.get("k")],
        [prefixed.num_keys(), prefixed.delete_key("k"), prefixed.delete_key("k"), prefixed.num_keys()],
        prefixed.wait(["x", "y"]),
    ]


def test_the_store_keeps_the_rules_of_torchs_own(square: Any) -> None:
    assert do(square.slice(a=1, b=1), use_store) == [
        [b"v", [b"1", b"2"], [2, 5], [True, False], [b"v", b"w", b"w"], [4, True, False, 3], None]
    ]


def test_a_key_that_nobody_sets_is_an_error_within_the_stores_limit(square: Any) -> None:
    def wait_in_vain() -> tuple[str, str]:
        from danaus.runtime.collectives.runtime_store import RuntimeStore

        store = RuntimeStore(context().actor_instance.proc_id, "vain", timeout_s=0.05)
        with pytest.raises(dist.DistStoreError) as got:
            dist.PrefixStore("p", store).get("k")
        with pytest.raises(dist.DistStoreError) as waited:
            store.wait(["p/j", "p/k"])
        return str(got.value), str(waited.value)

    [(got, waited)] = do(square.slice(a=0, b=0), wait_in_vain)

    assert "nobody has set p/k within 0.05 s" in got
    assert "nobody has set p/j, p/k" in waited


# errors:


def test_a_dimension_that_is_not_there_is_answered_with_those_that_are(square: Any) -> None:
    for error in fails(square, lambda: process_group("a", "rack")):
        assert isinstance(error, ValueError)
        assert str(error) == "process_group('a', 'rack'): no dimension 'rack'; the dimensions are {'a': 2, 'b': 2}"
    assert "device_mesh('rack')" in str(fails(square, lambda: device_mesh("rack"))[0])
    assert "named twice" in str(fails(square, lambda: process_group("a", "a"))[0])


def test_backends_and_limits_that_make_no_sense_are_refused(square: Any) -> None:
    assert 'expected "gloo" or "nccl"' in str(fails(square, lambda: process_group("a", backend="mpi"))[0])
    assert "seconds above zero" in str(fails(square, lambda: process_group("a", timeout=0))[0])
    if not torch.cuda.is_available():
        assert "sees no GPU" in str(fails(square, lambda: process_group("a", backend="nccl"))[0])


def test_a_slice_without_this_actor_and_a_mesh_of_others_are_refused(square: Any) -> None:
    def elsewhere() -> Any:
        return context().mesh.slice(a=1 - current_rank()["a"]).process_group("b")

    for rank, error in enumerate(fails(square, elsewhere)):
        assert f"this actor, rank {rank}" in str(error)
    with _spawned(square) as other:
        assert "is another mesh than this actor's" in str(fails(square, lambda: other.process_group("a"))[0])


def test_outside_of_an_actor_the_error_says_where_to_call() -> None:
    with pytest.raises(RuntimeError, match=r"process_group\('a'\): this code runs outside of an actor"):
        process_group("a")
    with pytest.raises(RuntimeError, match=r"device_mesh\(\): this code runs outside of an actor"):
        device_mesh()


def test_without_torch_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from danaus.runtime.collectives import groups

    monkeypatch.delitem(sys.modules, "danaus.runtime.collectives.c10d", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)

    with pytest.raises(ImportError, match=r"pip install 'danaus\[torch\]'"):
        groups._backend("process_group('a')", None, 1.0)


def test_members_that_ask_for_different_groups_are_told_who_is_missing(square: Any) -> None:
    def disagree() -> Any:
        return process_group(*(("a",) if current_rank().rank == 3 else ("b",)), timeout=0.3)

    with _spawned(square) as other:
        errors = other.do.options(timeout=LIMIT_S, on_error="all").call(disagree).get().values()
        missing = [str(error.exception) if isinstance(error, ActorError) else error for error in errors]

    assert "process_group('b') of 'other': rank 3 {'a': 1, 'b': 1} did not ask for it within 0.3 s" in missing[2]
    assert "process_group('a') of 'other': rank 1 {'a': 0, 'b': 1} did not ask for it within 0.3 s" in missing[3]


def test_members_that_gave_up_may_ask_again(square: Any) -> None:
    def alone() -> Any:
        return process_group("a", timeout=0.1)

    with _spawned(square) as other:
        one = other.slice(a=0, b=0)
        assert isinstance(fails(one, alone)[0], TimeoutError)
        assert do(other, lambda: process_group("a").size()) == [2] * 4


# ends:


def test_groups_end_with_their_actor_and_leave_nothing_in_torch(square: Any) -> None:
    def form() -> int:
        device_mesh()
        return len(dist.distributed_c10d._world.pg_map)

    def left() -> tuple[int, ...]:
        world = dist.distributed_c10d._world
        tables = (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config, world.pg_to_tag)
        return tuple(map(len, (*tables, world.tags_to_pg)))

    before = do(square, left)
    with _spawned(square) as other:
        do(other, form)
        assert do(square, left) != before
    assert do(square, left) == before


def test_the_groups_of_other_actors_outlive_the_one_that_ended(square: Any) -> None:
    def total() -> float:
        ones = torch.ones(1)
        dist.all_reduce(ones, group=process_group("a", "b"))
        return ones.item()

    with _spawned(square) as other:
        do(other, device_mesh_total)
        assert do(square, total) == [4.0] * 4

    assert do(square, total) == [4.0] * 4


def device_mesh_total() -> float:
    device_mesh()
    ones = torch.ones(1)
    dist.all_reduce(ones)
    return ones.item()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_member_that_dies_before_the_group_is_formed_is_named_at_once(victim: int) -> None:
    with this_host().spawn_procs({"dp": 2}, name="pair", preload=PRELOAD) as procs:
        actors: Any = procs.spawn("pair", Member)
        dying, other = actors.slice(dp=victim), actors.slice(dp=1 - victim)
        pid = dying.do.call_one(os.getpid).get(LIMIT_S)
        waiting = other.do.options(timeout=LIMIT_S).call_one(lambda: process_group("dp").size())

        os.kill(pid, signal.SIGKILL)

        with pytest.raises(SupervisionError) as failed:
            waiting.get()
    assert f"pid {pid}) was killed by SIGKILL" in str(failed.value)


def test_a_store_whose_proc_dies_fails_those_who_wait_in_it() -> None:
    def wait_for_key(proc_id: str) -> str:
        from danaus.runtime.collectives.runtime_store import RuntimeStore

        store = RuntimeStore(proc_id, "doomed", timeout_s=LIMIT_S)
        with pytest.raises(dist.DistStoreError) as failed:
            dist.PrefixStore("p", store).get("k")
        return str(failed.value)

    with this_host().spawn_procs({"dp": 2}, name="pair", preload=PRELOAD) as procs:
        actors: Any = procs.spawn("pair", Member)
        pid = actors.slice(dp=0).do.call_one(os.getpid).get(LIMIT_S)
        waiting = actors.slice(dp=1).do.call_one(wait_for_key, f"{procs._mesh_id}.0")

        os.kill(pid, signal.SIGKILL)

        assert "was killed by SIGKILL" in waiting.get(LIMIT_S)


def test_an_actor_in_the_scripts_own_process_has_groups_of_one() -> None:
    actor: Any = this_proc().spawn("single", Member)

    assert actor.do.call_one(lambda: process_group().size()).get(LIMIT_S) == 1
    actor.stop().get(LIMIT_S)
    assert not dist.is_initialized()


SCRIPT = """
import torch
import torch.distributed as dist
from danaus import Actor, endpoint, process_group, device_mesh, this_host

class Member(Actor):
    @endpoint
    def total(self):
        ones = torch.ones(1)
        dist.all_reduce(ones, group=device_mesh("dp").get_group())
        return ones.item()

if __name__ == "__main__":
    procs = this_host().spawn_procs({"dp": 3})
    members = procs.spawn("members", Member)
    print(list(members.total.call().get(timeout=30).values()))
"""


def test_a_script_with_groups_ends_without_a_word_on_stderr(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    done = subprocess.run(
        [sys.executable, "-W", "error", script], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )

    assert (done.stdout, done.stderr, done.returncode) == ("[3.0, 3.0, 3.0]\n", "", 0)
