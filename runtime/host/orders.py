"""What was ordered for each mesh: how its processes are made, as often as that is needed, and the GPUs they lease."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from ..address import agent_of, file_name, host_of, mesh_of, per_host_of, rank_of, slots_of
from ..workspace.paths import map_sys_path, path_map
from ..workspace.preloads import preload_key
from .devices import DeviceLeases, device_env, read_gpus, usable_devices
from .proc_table import MeshInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .devices import Device

_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

MAX_SPARE_LOSSES: Final = 3
"""Spares of one mesh that may end by themselves before no more are started."""


class Orders:
    """The meshes of a host.

    Args:
        directory: The job's private directory.
        host: Name of this host.
        slot: Of this host in the job.
    """

    def __init__(self, directory: str, host: str, slot: int = 0) -> None:
        self._directory, self._host, self._slot = directory, host, slot
        self.host_address = "127.0.0.1"
        """Where processes of other hosts reach those of this one."""
        self._orders: dict[str, dict[str, Any]] = {}
        self._spare_losses: dict[str, int] = {}
        self._leases: DeviceLeases | None = None
        self._devices: Sequence[Device] = ()
        self._device_indices: dict[str, Sequence[int]] = {}

    def add(self, fields: dict[str, Any], owner: str) -> dict[str, Any]:
        """Note an order of ``owner``, in place of an earlier one for the same mesh; return it."""
        order = self._orders[fields["mesh"]] = {**fields, "owner": owner}
        return order

    def get(self, mesh: str) -> dict[str, Any] | None:
        """Return what was ordered for a mesh that somebody still wants."""
        return self._orders.get(mesh)

    def owned_by(self, proc: str) -> list[str]:
        """Meshes that a process has ordered."""
        return [mesh for mesh, order in self._orders.items() if order["owner"] == proc]

    def info(self, order: dict[str, Any]) -> MeshInfo:
        """What the processes of an order have in common."""
        dims = tuple((label, size) for label, size in order["dims"])
        owner, slot = order["owner"], host_of(order["owner"])
        return MeshInfo(
            order["mesh"],
            order["name"],
            owner,
            dims,
            order["count"],
            restartable=order["restartable"],
            watcher="" if slot == self._slot else agent_of(slot),
        )

    def common(self, order: dict[str, Any]) -> dict[str, Any]:
        """What a zygote is told of all processes of an order."""
        return {
            "directory": self._directory,
            "host": self._host,
            "host_address": self.host_address,
            "size": order["count"],
            "boot_file": order["boot_file"],
            "sys_path": self.sys_path(order),
            "path_map": self._path_map(order),
            "workspaces": order["workspaces"],
        }

    def sys_path(self, order: dict[str, Any]) -> list[str]:
        """Where the processes of an order look for modules on this host."""
        is_near = host_of(order["owner"]) == self._slot
        return map_sys_path(order["sys_path"], self._path_map(order), own=None if is_near else sys.path)

    def zygote_key(self, order: dict[str, Any]) -> str:
        """The zygote that has preloaded what an order asks for, as it is on this host now."""
        tops = self._path_map(order).values()
        return preload_key(order["zygote"], order["preload"], self.sys_path(order), tops)

    def _path_map(self, order: dict[str, Any]) -> dict[str, str]:
        return path_map(order["workspaces"], host=self._host, slot=self._slot)

    def request(self, order: dict[str, Any], proc: str) -> dict[str, Any]:
        """What a process is told of itself; a spare gets what depends on its rank once it has one.

        Raises:
            OSError, ValueError: There are not as many GPUs as were ordered, or they cannot be asked.
        """
        rank, count = rank_of(proc), self._count_here(order)
        threads = str(max(1, (os.cpu_count() or 1) // max(count, 1)))
        env = {**dict.fromkeys(_THREAD_VARIABLES, threads), **order["env"]}
        request = {"proc": proc, "path": f"{self._directory}/{file_name(proc)}", "env": env}
        if rank >= order["count"]:
            return {**request, "cpus": None, "mem_nodes": None}
        place = rank % max(count, 1)
        return {
            **request,
            "env": {**env, **self._device_env(order, place, count)},
            "cpus": order["cpus"][place] if order["cpus"] else None,
            "mem_nodes": order["mem_nodes"][place] if order["mem_nodes"] else None,
        }

    def _count_here(self, order: dict[str, Any]) -> int:
        """How many ranks of a mesh this host has."""
        return per_host_of(order["mesh"]) or order["count"]

    def spares(self, order: dict[str, Any], num_spares: int) -> list[str]:
        """Addresses of this host's spares of a mesh."""
        mesh = order["mesh"]
        slots = slots_of(mesh)
        first = order["count"] + slots.index(self._slot)
        return [f"{mesh}.{first + index * len(slots)}" for index in range(num_spares)]

    def _device_env(self, order: dict[str, Any], place: int, count: int) -> dict[str, str]:
        mesh = order["mesh"]
        if order["gpus"] == "none":
            return {"CUDA_VISIBLE_DEVICES": ""}
        if self._leases is None:
            self._devices = usable_devices(read_gpus().gpus, existing=os.environ.get("CUDA_VISIBLE_DEVICES"))
            self._leases = DeviceLeases(self._devices)
        if not self._devices:
            return {}
        if mesh not in self._device_indices:
            is_shared = order["gpus"] == "shared"
            self._device_indices[mesh] = self._leases.acquire(mesh, count, share_gpus=is_shared)
        return device_env(self._device_indices[mesh][place], self._devices)

    def may_replace_spare(self, proc: str) -> bool:
        """A spare has ended by itself; return whether to start another."""
        mesh = mesh_of(proc)
        losses = self._spare_losses[mesh] = self._spare_losses.get(mesh, 0) + 1
        return losses <= MAX_SPARE_LOSSES

    def on_owner_lost(self, proc: str) -> None:
        """A process has died: remove what it wrote for meshes that it did not come to order."""
        ending = f".boot@{file_name(proc)}"
        self._remove(lambda name: name.endswith(ending))

    def _remove(self, is_left: Callable[[str], bool]) -> None:
        for name in filter(is_left, os.listdir(self._directory)):
            with contextlib.suppress(OSError):
                os.unlink(f"{self._directory}/{name}")

    def forget(self, mesh: str) -> None:
        """Nobody wants processes of ``mesh`` any more."""
        self._orders.pop(mesh, None)
        self._spare_losses.pop(mesh, None)

    def on_empty(self, mesh: str) -> None:
        """There are no processes of ``mesh``: free what they shared, and remove what they left."""
        is_wanted, short = mesh in self._orders, file_name(mesh)
        self._remove(
            lambda name: name.startswith(f"{short}.") and not (is_wanted and name.startswith(f"{short}.boot@"))
        )
        if self._leases is not None:
            self._leases.release(mesh)
            self._device_indices.pop(mesh, None)
