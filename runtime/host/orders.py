"""What was ordered for each mesh: how its processes are made, as often as that is needed, and the GPUs they lease."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Final

from ..address import mesh_of, rank_of
from .devices import DeviceLeases, device_env, read_gpus, usable_devices
from .proc_table import MeshInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .devices import Device

MAX_SPARE_LOSSES: Final = 3
"""Spares of one mesh that may end by themselves before no more are started."""


class Orders:
    """The meshes of a host.

    Args:
        directory: The job's private directory.
        host: Name of this host.
    """

    def __init__(self, directory: str, host: str) -> None:
        self._directory, self._host = directory, host
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
        return MeshInfo(
            order["mesh"], order["name"], order["owner"], dims, order["count"], restartable=order["restartable"]
        )

    def common(self, order: dict[str, Any]) -> dict[str, Any]:
        """What a zygote is told of all processes of an order."""
        return {
            "directory": self._directory,
            "host": self._host,
            "size": order["count"],
            "boot_file": order["boot_file"],
        }

    def request(self, order: dict[str, Any], proc: str) -> dict[str, Any]:
        """What a process is told of itself; a spare gets what depends on its rank once it has one.

        Raises:
            OSError, ValueError: There are not as many GPUs as were ordered, or they cannot be asked.
        """
        rank = rank_of(proc)
        request = {"proc": proc, "path": f"{self._directory}/{proc}", "env": order["env"]}
        if rank >= order["count"]:
            return {**request, "cpus": None, "mem_nodes": None}
        return {
            **request,
            "env": {**order["env"], **self._device_env(order, rank)},
            "cpus": order["cpus"][rank] if order["cpus"] else None,
            "mem_nodes": order["mem_nodes"][rank] if order["mem_nodes"] else None,
        }

    def _device_env(self, order: dict[str, Any], rank: int) -> dict[str, str]:
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
            self._device_indices[mesh] = self._leases.acquire(mesh, order["count"], share_gpus=is_shared)
        return device_env(self._device_indices[mesh][rank], self._devices)

    def may_replace_spare(self, proc: str) -> bool:
        """A spare has ended by itself; return whether to start another."""
        mesh = mesh_of(proc)
        losses = self._spare_losses[mesh] = self._spare_losses.get(mesh, 0) + 1
        return losses <= MAX_SPARE_LOSSES

    def on_owner_lost(self, proc: str) -> None:
        """A process has died: remove what it wrote for meshes that it did not come to order."""
        self._remove(lambda name: name.endswith(f".boot@{proc}"))

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
        is_wanted = mesh in self._orders
        self._remove(lambda name: name.startswith(f"{mesh}.") and not (is_wanted and name.startswith(f"{mesh}.boot@")))
        if self._leases is not None:
            self._leases.release(mesh)
            self._device_indices.pop(mesh, None)
