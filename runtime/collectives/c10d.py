"""Torch's side of a process group: the store it forms through, its backends, its entries in torch's tables.

This file alone touches what torch keeps private. Torch has no public way to make a group without a default group, a
port and a look-up of the host's name, so one is made of a `Store`, a `ProcessGroup` and backends with an explicit
device, and entered in torch's tables, as `torch.distributed.distributed_c10d._new_process_group_helper` does it.

Much of torch asks for the default group (`get_rank`, DeviceMesh, DDP, distributed checkpoint). The first group of a
proc brings one: it covers the proc mesh, so torch's global rank is the proc's rank in its mesh. It has no connections
of its own. A group that covers all procs lends it its backends.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from .runtime_store import RuntimeStore
from .sockets import numeric, own_listeners

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .sockets import Address

BOTH: Final = "cpu:gloo,cuda:nccl"
GLOO_KEYS: Final = "gloo/"
"""What the names of Gloo's keys in a group's store begin with."""

_FIRST_SPARE_TYPE: Final = 10
"""Torch keeps one backend per number of a type; from here on no type of its own has a number."""

MAX_RENEWALS: Final = 120
"""How often a group may be renewed: the numbers of types are one byte, and each time takes two."""

# Private to torch, or missing in its type stubs.
_tables: Any = distributed_c10d
_Gloo: Any = dist.ProcessGroupGloo

_Types = dist.ProcessGroup.BackendType
_lock = threading.RLock()
_device_lock = threading.Lock()
_default: tuple[dist.ProcessGroup, Store] | None = None
_lender: dist.ProcessGroup | None = None


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


@dataclass(frozen=True, slots=True)
class Device:
    """Where a group's Gloo connections are accepted: one per group, so that its port tells them from all others."""

    handle: Any
    listener: Address


def open_device(host: str) -> Device:
    """Listen for the other members.

    Args:
        host: Where those on other hosts reach this one: an IP address or a name. ``GLOO_SOCKET_IFNAME``, which torch's
            own groups go by, comes before it.

    Raises:
        RuntimeError: This machine has no such address or interface, or nobody knows the name.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    try:
        address = None if interface else numeric(host)
        where = {"interface": interface} if interface else {"hostname": address}
        with _device_lock:
            while True:
                before = own_listeners(address)
                handle = _Gloo.create_device(**where)
                new = own_listeners(address) - before
                # Code of the user's may have begun to listen at the same moment.
                if len(new) == 1:
                    return Device(handle, new.pop())
    except (OSError, RuntimeError) as error:
        advice = "correct GLOO_SOCKET_IFNAME" if interface else "give its host an address of its own to be reached at"
        raise RuntimeError(f"Gloo cannot listen on {interface or host!r}: {error}; {advice}") from error


def make_group(recipe: Recipe, store: RuntimeStore, device: Device) -> dist.ProcessGroup:
    """Connect to the other members, who do the same, and enter the group in torch's tables.

    Raises:
        RuntimeError: A member is gone, or did not connect in time (``DistStoreError``, from the store).
    """
    # A plain ProcessGroup: in a Python subclass, torch holds the GIL while it runs what the subclass does not override,
    # and Gloo's threads need the GIL to end.
    group = dist.ProcessGroup(store, recipe.rank, len(recipe.ranks))
    group._set_default_backend(_Types.NCCL if "nccl" in recipe.backend else _Types.GLOO)
    for kind, backend, devices in _make_backends(recipe, store, device):
        for each in devices:
            group._register_backend(torch.device(each), kind, backend)
    group._set_group_name(_group_name(recipe.name))
    group._set_group_desc(recipe.label)
    with _lock:
        _enter(group, recipe.name, recipe.backend, store, recipe.ranks)
    return group


def renew_group(group: dist.ProcessGroup, recipe: Recipe, store: RuntimeStore, device: Device, turn: int) -> None:
    """Connect to the members of the next generation, and let ``group`` use these connections from now on.

    Its old backends stay within it, ended, each with two sleeping threads: torch lets nobody take them out. They hold
    no descriptor, since all generations share one device.

    Args:
        group: The group.
        recipe: What it is made of.
        store: Where the members of the next generation meet.
        device: What all of its generations listen with.
        turn: How often this object is renewed, this time included; at most ``MAX_RENEWALS``.

    Raises:
        RuntimeError: See :func:`make_group`.
    """
    made = _make_backends(recipe, store, device)
    with _lock:
        for place, (_, backend, devices) in enumerate(made):
            kind = _Types(_FIRST_SPARE_TYPE + 2 * turn + place)
            for each in devices:
                group._register_backend(torch.device(each), kind, backend)
                if _lender is group and _default is not None:
                    _default[0]._register_backend(torch.device(each), kind, backend)
        _tables._world.pg_map[group] = (_tables._world.pg_map[group][0], store)


def _make_backends(recipe: Recipe, store: RuntimeStore, device: Device) -> list[tuple[Any, Any, tuple[str, ...]]]:
    """Each backend of a group with its type and the devices whose tensors it takes."""
    has_nccl = "nccl" in recipe.backend
    made: list[tuple[Any, Any, tuple[str, ...]]] = []
    if "gloo" in recipe.backend:
        gloo = _make_gloo(recipe, PrefixStore(GLOO_KEYS, store), device)
        made.append((_Types.GLOO, gloo, ("cpu",) if has_nccl or not torch.cuda.is_available() else ("cpu", "cuda")))
    if has_nccl:
        made.append((_Types.NCCL, _make_nccl(recipe, PrefixStore("nccl/", store)), ("cuda",)))
    return made


def aborts_of(group: dist.ProcessGroup) -> list[Callable[[], object]]:
    """What ends NCCL's part of the group as it is now; each call may take a while."""
    backends: list[Any] = [group._get_backend(device) for device in group._device_types]
    return [backend.abort for backend in backends if backend.name() == "nccl"]


def _make_gloo(recipe: Recipe, store: Store, device: Device) -> Any:
    options = _Gloo._Options()
    options._devices = [device.handle]
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
            limit_s = _tables.default_pg_timeout.total_seconds()
            store = RuntimeStore(f"{mesh_id}.0", "world", timeout_s=limit_s, follows=True)
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
