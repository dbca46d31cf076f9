"""Torch's side of a process group: the store it forms through, its backends, its entries in torch's tables.

This file alone touches what torch keeps private. Torch has no public way to make a group without a default group, a
port and a look-up of the host's name, so one is made of a `Store`, a `ProcessGroup` and backends with an explicit
device, and entered in torch's tables, as `torch.distributed.distributed_c10d._new_process_group_helper` does it.

Much of torch asks for the default group (`get_rank`, DeviceMesh, DDP, distributed checkpoint). The first group of a
proc brings one: it covers the proc mesh, so torch's global rank is the proc's rank in its mesh. It has no connections
of its own. A group that covers all procs lends it its backends.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from ..context import is_running, local_proc
from ..errors import ActorError, DanausError
from .store import store_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..calls.future import Future

LOOPBACK: Final = "127.0.0.1"
BOTH: Final = "cpu:gloo,cuda:nccl"

_SPARE_S: Final = 10.0
"""How much longer than a store's own limit its proc may take to answer."""

# Private to torch, or missing in its type stubs.
_tables: Any = distributed_c10d
_Gloo: Any = dist.ProcessGroupGloo

_Types = dist.ProcessGroup.BackendType
_lock = threading.RLock()
_default: tuple[dist.ProcessGroup, Store] | None = None
_lender: dist.ProcessGroup | None = None


def wait_here(future: Future[Any]) -> Any:
    """Block for ``future``, also on a thread whose event loop runs: forming a group blocks, as its collectives do."""
    loop = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    try:
        return future.get()
    finally:
        asyncio._set_running_loop(loop)


class RuntimeStore(Store):
    """A space of keys in a proc's store actor, as torch's Store.

    Whoever uses it keeps it alive: known to C++ alone, a store loses its Python methods. Every method raises
    ``DistStoreError`` where the serving proc is gone, the group has ended or the time is over.

    Args:
        proc_id: The serving proc.
        space: Name of the space.
        timeout_s: How long ``get`` and ``wait`` wait for a key.
    """

    if TYPE_CHECKING:
        timeout: timedelta

    def __init__(self, proc_id: str, space: str, *, timeout_s: float) -> None:
        super().__init__()
        self._proc_id, self._space = proc_id, space
        self._server = store_in(proc_id)
        self._runtime = local_proc()
        self._clones: list[RuntimeStore] = []
        self.set_timeout(timedelta(seconds=timeout_s))
        self.limit_s: float | None = timeout_s
        """No wait lasts longer than this, whatever the caller says; set while a group forms."""

    def _ask(self, method: str, *args: Any, timeout_s: float = 0.0) -> Any:
        if not is_running(self._runtime):
            raise dist.DistStoreError(f"store of {self._space}: the runtime of this process has ended")
        try:
            call = getattr(self._server, method).options(timeout=timeout_s + _SPARE_S)
            return wait_here(call.call_one(self._space, *args))
        except ActorError as error:
            raise dist.DistStoreError(f"store of {self._space}: {error.exception or error}") from None
        except DanausError as error:
            raise dist.DistStoreError(f"store of {self._space} in {self._proc_id}: {error}") from error

    def _limited(self, timeout: timedelta | None) -> float:
        asked_s = (self.timeout if timeout is None else timeout).total_seconds()
        return asked_s if self.limit_s is None else min(asked_s, self.limit_s)

    def set(self, key: str, value: str | bytes) -> None:
        self.multi_set([key], [value])

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        self._ask("put", {key: _as_bytes(value) for key, value in zip(keys, values, strict=True)})

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        timeout_s = self._limited(None)
        return self._ask("get", list(keys), timeout_s, timeout_s=timeout_s)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        timeout_s = self._limited(timeout)
        self._ask("wait", list(keys), timeout_s, timeout_s=timeout_s)

    def add(self, key: str, value: int) -> int:
        return self._ask("add", key, value)

    def append(self, key: str, value: str | bytes) -> None:
        self._ask("append", key, _as_bytes(value))

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        return self._ask("compare_set", key, _as_bytes(expected_value), _as_bytes(desired_value))

    def check(self, keys: Sequence[str]) -> bool:
        return set(self.list_keys()) >= set(keys)

    def list_keys(self) -> list[str]:
        return self._ask("keys")

    def num_keys(self) -> int:
        return len(self.list_keys())

    def delete_key(self, key: str) -> bool:
        return self._ask("delete", key)

    def has_extended_api(self) -> bool:
        return True

    def clone(self) -> RuntimeStore:
        timeout_s = self.timeout.total_seconds()
        self._clones.append(RuntimeStore(self._proc_id, self._space, timeout_s=timeout_s))
        return self._clones[-1]

    # The names that C++ looks for.
    getNumKeys = num_keys  # noqa: N815
    deleteKey = delete_key  # noqa: N815


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a group is made of."""

    name: str
    """Unique in every member's process; torch's functional collectives find the group by it."""
    label: str
    ranks: tuple[int, ...]
    """Ranks of the members in their proc mesh, in group order."""
    rank: int
    """This process's place in it."""
    backend: str


def resolve_backend(backend: str | None) -> str:
    """Return what a group is made with: NCCL with Gloo beside it where this process sees a GPU, else Gloo.

    Raises:
        ValueError: ``backend`` is unknown, or this build or machine does not have it.
    """
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    if backend is None:
        return BOTH if has_nccl else "gloo"
    if backend not in {"gloo", "nccl"}:
        raise ValueError(f'process_group(backend={backend!r}): expected "gloo" or "nccl", or None to choose by device')
    if backend == "nccl" and not has_nccl:
        raise ValueError(
            'process_group(backend="nccl"): this process sees no GPU, or its torch has no NCCL; use "gloo"'
        )
    return backend


def make_group(recipe: Recipe, store: RuntimeStore, hosts: Sequence[str]) -> dist.ProcessGroup:
    """Connect to the other members, who do the same, and enter the group in torch's tables.

    Raises:
        RuntimeError: A member is gone, or did not connect in time (``DistStoreError``, from the store).
    """
    size = len(recipe.ranks)
    # A plain ProcessGroup: in a Python subclass, torch holds the GIL while it runs what the subclass does not override,
    # and Gloo's threads need the GIL to end. A later generation can register its backend under a fresh BackendType,
    # which torch then uses for the device.
    group = dist.ProcessGroup(store, recipe.rank, size)
    has_nccl = "nccl" in recipe.backend
    group._set_default_backend(_Types.NCCL if has_nccl else _Types.GLOO)
    if "gloo" in recipe.backend:
        gloo = _make_gloo(recipe, PrefixStore("gloo/", store), hosts)
        for device in ("cpu",) if has_nccl or not torch.cuda.is_available() else ("cpu", "cuda"):
            group._register_backend(torch.device(device), _Types.GLOO, gloo)
    if has_nccl:
        nccl = _make_nccl(recipe, PrefixStore("nccl/", store))
        group._register_backend(torch.device("cuda"), _Types.NCCL, nccl)
    group._set_group_name(_group_name(recipe.name))
    group._set_group_desc(recipe.label)
    with _lock:
        _enter(group, recipe.name, recipe.backend, store, recipe.ranks)
    return group


def _make_gloo(recipe: Recipe, store: Store, hosts: Sequence[str]) -> Any:
    options = _Gloo._Options()
    # A device per group: its listener's port tells the group's sockets from all others.
    options._devices = [_Gloo.create_device(hostname=_listen_address(hosts))]
    options._timeout = _tables._get_default_timeout(dist.Backend("gloo"))
    options.global_ranks_in_group = list(recipe.ranks)
    options.group_name = _group_name(recipe.name)
    backend = _Gloo(store, recipe.rank, len(recipe.ranks), options)
    backend._set_sequence_number_for_group()
    return backend


def _make_nccl(recipe: Recipe, store: Store) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _tables._get_default_timeout(dist.Backend("nccl"))
    options.global_ranks_in_group = list(recipe.ranks)
    options.group_name = _group_name(recipe.name)
    backend = dist.ProcessGroupNCCL(store, recipe.rank, len(recipe.ranks), options)
    backend._set_sequence_number_for_group()
    # Else a member that cannot join is first noticed by the first collective.
    backend.eager_connect_single_device(torch.device("cuda", torch.cuda.current_device()))
    return backend


def _listen_address(hosts: Sequence[str]) -> str:
    """Address that Gloo listens on: a number, so that no name is looked up."""
    if len(set(hosts)) > 1:
        raise RuntimeError(
            f"Gloo groups over several hosts are not part of this version; the members are on {set(hosts)}"
        )
    return LOOPBACK


def _enter(group: dist.ProcessGroup, name: str, backend: str, store: Store, ranks: Sequence[int]) -> None:
    world, tag = _tables._world, f"danaus:{name}"
    world.pg_map[group] = (dist.Backend(backend), store)
    world.pg_names[group] = name
    world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
    world.pg_backend_config[group] = str(_tables.BackendConfig(dist.Backend(backend)))
    world.pg_to_tag[group] = tag
    world.tags_to_pg.setdefault(tag, []).append(group)
    _tables._register_process_group(name, group)


def _group_name(name: str) -> Any:
    """A plain str at run time; newer stubs have a type of its own for it."""
    return name


def is_entered(group: dist.ProcessGroup) -> bool:
    """Whether torch still knows the group: a user may have called ``destroy_process_group``."""
    return group in _tables._world.pg_map


def end_group(group: dist.ProcessGroup) -> None:
    """Close the group's connections and take it out of torch's tables."""
    with _lock:
        was_entered = is_entered(group)
        _remove(group)
        if _lender is group and _default is not None:
            default, store = _default
            _remove(default)
            _make_default(default.rank(), default.size(), store)
    if was_entered:
        # Outside of the lock: NCCL may take its time.
        group.shutdown()


def _remove(group: dist.ProcessGroup) -> None:
    world = _tables._world
    # Not group.group_name, which is that of its backends: the default group's are lent.
    name = world.pg_names.pop(group, None)
    for table in (world.pg_map, world.pg_group_ranks, world.pg_backend_config, world.pg_coalesce_state):
        table.pop(group, None)
    tag = world.pg_to_tag.pop(group, None)
    if tag is not None:
        world.tags_to_pg.pop(tag, None)
    if name is not None:
        _tables._unregister_process_group(name)


def ensure_default(mesh_id: str, rank: int, size: int) -> None:
    """Have a default group, in which this process's rank is that in its proc mesh.

    Raises:
        RuntimeError: The user has initialised another default group, whose ranks are not those of the proc mesh.
    """
    with _lock:
        if not dist.is_initialized():
            store = RuntimeStore(f"{mesh_id}.0", "world", timeout_s=_tables.default_pg_timeout.total_seconds())
            store.limit_s = None
            _make_default(rank, size, store)
        elif (dist.get_rank(), dist.get_world_size()) != (rank, size):
            raise RuntimeError(
                f"torch.distributed was initialised here as rank {dist.get_rank()} of {dist.get_world_size()}, but "
                f"this process is rank {rank} of {size} in its mesh: initialise it with those, or not at all"
            )


def _make_default(rank: int, size: int, store: Store) -> None:
    global _default, _lender
    default = dist.ProcessGroup(store, rank, size)
    default._set_default_backend(_Types.GLOO)
    default._set_group_name(_group_name("danaus"))
    default._set_group_desc("default_pg")
    _enter(default, "danaus", "gloo", store, range(size))
    _tables._update_default_pg(default)
    _default, _lender = (default, store), None


def lend_to_default(group: dist.ProcessGroup) -> None:
    """Let the default group use the connections of ``group``, if that covers all of its ranks."""
    global _lender
    with _lock:
        default = None if _default is None else _default[0]
        if default is None or default is not dist.group.WORLD or _lender is not None:
            return
        if dist.get_process_group_ranks(group) != list(range(default.size())):
            return
        world = _tables._world
        for device in group._device_types:
            backend = group._get_backend(device)
            default._register_backend(device, _Types.NCCL if backend.name() == "nccl" else _Types.GLOO, backend)
        name = world.pg_map[group][0]
        default._set_default_backend(_Types.NCCL if "nccl" in name else _Types.GLOO)
        world.pg_map[default] = (name, world.pg_map[default][1])
        world.pg_backend_config[default] = world.pg_backend_config[group]
        _lender = group


def drop_default() -> None:
    """Forget the default group, if it is ours: the last group of this process has ended."""
    global _default, _lender
    with _lock:
        if _default is not None and dist.group.WORLD is _default[0]:
            # Groups that the user made of it with new_group end too. Not all at once: that would also start their
            # numbering again, and keys of those that ended are in the store still.
            for group in [group for group in _tables._world.pg_map if group is not _default[0]]:
                dist.destroy_process_group(group)
            _remove(_default[0])
            _tables._update_default_pg(None)
        _default = _lender = None


def make_device_mesh(
    groups: Sequence[dist.ProcessGroup], ranks: Sequence[int], sizes: Sequence[int], dims: tuple[str, ...], device: str
) -> DeviceMesh:
    """Return a DeviceMesh over ``groups``, one per dimension; ``ranks`` are those of the procs, row-major."""
    if len(groups) == 1:
        return DeviceMesh.from_group(groups[0], device, mesh_dim_names=dims)
    return DeviceMesh.from_group(list(groups), device, mesh=torch.tensor(ranks).reshape(*sizes), mesh_dim_names=dims)
