"""Which GPUs this host has, which proc uses which, and which mesh holds them.

A proc sees its own GPU first and then the host's others, rotated, because CUDA IPC needs both ends to see both devices.
All but :func:`read_gpus` is pure. Without NVIDIA GPUs every answer is "none", with the reason.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .logs import format_ranks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# What operators write to hide every GPU.
_HIDDEN = {"-1", "none", "void", "NoDevFiles"}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One physical GPU, as the driver numbers it (by PCI bus)."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    migs: tuple[str, ...] = ()
    """UUIDs of its MIG devices; where there are any, the GPU itself cannot be used by CUDA."""


@dataclass(frozen=True, slots=True)
class GpuInventory:
    """The GPUs of this host, and why there are none where there are none."""

    gpus: tuple[Gpu, ...]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """Something that CUDA_VISIBLE_DEVICES can name: a GPU or a MIG device."""

    token: str
    """As CUDA_VISIBLE_DEVICES says it: an index or a UUID."""
    uuid: str
    is_mig: bool = False


def read_gpus() -> GpuInventory:
    """Ask the NVIDIA driver, through nvidia-ml-py. Never raises: a host without GPUs is a host."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return GpuInventory((), "nvidia-ml-py is not installed: pip install 'danaus[gpu]'")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return GpuInventory((), f"the NVIDIA driver does not answer: {error}")
    try:
        gpus = tuple(_read_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
    except nvml.NVMLError as error:
        return GpuInventory((), f"the NVIDIA driver failed: {error}")
    finally:
        nvml.nvmlShutdown()
    return GpuInventory(gpus, None if gpus else "the NVIDIA driver reports no GPU")


def usable_devices(gpus: Sequence[Gpu], *, existing: str | None) -> tuple[Device, ...]:
    """Return the devices that procs may use, in the order of ``existing`` where the operator set it.

    Args:
        gpus: what the host has.
        existing: CUDA_VISIBLE_DEVICES of the host agent (indices, or UUIDs, which may be abbreviated), or None.

    Raises:
        ValueError: ``existing`` names a device twice, or one that the host does not have.
    """
    known = {device.token: device for device in _all_devices(gpus)}
    if existing is None:
        return tuple(known.values())
    chosen = list[Device]()
    for token in (part.strip() for part in existing.split(",")):
        if token in _HIDDEN or not token:
            break  # CUDA, too, ignores what follows
        device = _find_device(token, gpus)
        if device is None:
            have = ", ".join(f"{device.token} ({device.uuid})" for device in known.values()) or "none"
            raise ValueError(f"CUDA_VISIBLE_DEVICES={existing}: this host has no device {token!r}; it has {have}")
        if any(device.uuid == other.uuid for other in chosen):
            raise ValueError(f"CUDA_VISIBLE_DEVICES={existing}: names {token!r} twice, which CUDA refuses")
        chosen.append(device)
    return tuple(chosen)


def device_env(own: int, devices: Sequence[Device]) -> dict[str, str]:
    """Return the environment of a proc whose own device is ``devices[own]``.

    It sees that one as ``cuda:0`` and the others after it. A proc with a MIG device sees nothing else, because CUDA
    opens one MIG device only.
    """
    if devices[own].is_mig:
        return {"CUDA_VISIBLE_DEVICES": devices[own].token}
    order = [*devices[own:], *devices[:own]]
    # Indices mean the driver's numbering only under PCI_BUS_ID; the default is "fastest first".
    tokens = ",".join(device.token for device in order if not device.is_mig)
    return {"CUDA_VISIBLE_DEVICES": tokens, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def visible_devices(
    rank: int, procs_per_host: int, devices: Sequence[Device], *, share_gpus: bool = False
) -> dict[str, str]:
    """Return the environment of the proc with number ``rank`` on its host, where nobody else uses the devices.

    Raises:
        ValueError: more procs than devices, and sharing was not asked for.
    """
    if not 0 <= rank < procs_per_host:
        raise ValueError(f"rank {rank} is not among the {procs_per_host} procs of this host")
    own = DeviceLeases(devices).acquire("this mesh", procs_per_host, share_gpus=share_gpus)
    return device_env(own[rank], devices) if own else {}


class DeviceLeases:
    """Says which mesh uses which device of a host, so that two never share one unasked."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self.devices = tuple(devices)
        self._holders: list[list[str]] = [[] for _ in self.devices]

    def acquire(self, mesh: str, num_procs: int, *, share_gpus: bool = False) -> tuple[int, ...]:
        """Give each of a mesh's procs on this host a device of its own, or the least used ones where it shares.

        Returns:
            For each proc the index of its device in ``devices``; empty on a host without devices.

        Raises:
            ValueError: too few devices are free, and sharing was not asked for; nothing is leased then.
        """
        if not self.devices:
            return ()
        if share_gpus:
            chosen = self._least_used(num_procs)
        else:
            free = [index for index, holders in enumerate(self._holders) if not holders]
            if num_procs > len(free):
                raise ValueError(self._refusal(mesh, num_procs, len(free)))
            chosen = free[:num_procs]
        for index in chosen:
            self._holders[index].append(mesh)
        return tuple(chosen)

    def release(self, mesh: str) -> None:
        """Take back every device that a mesh holds; it has ended."""
        self._holders = [[holder for holder in holders if holder != mesh] for holders in self._holders]

    def holders(self) -> dict[str, tuple[int, ...]]:
        """Return the devices that each mesh holds."""
        held: dict[str, list[int]] = {}
        for index, holders in enumerate(self._holders):
            for mesh in dict.fromkeys(holders):
                held.setdefault(mesh, []).append(index)
        return {mesh: tuple(indices) for mesh, indices in held.items()}

    def _least_used(self, num_procs: int) -> list[int]:
        load = [len(holders) for holders in self._holders]
        chosen = list[int]()
        for _ in range(num_procs):
            index = min(range(len(load)), key=lambda i: (load[i], i))
            load[index] += 1
            chosen.append(index)
        return chosen

    def _refusal(self, mesh: str, num_procs: int, num_free: int) -> str:
        held = ", ".join(f"{name!r} holds {format_ranks(indices)}" for name, indices in self.holders().items())
        free = f"{num_free} of this host's {len(self.devices)} GPUs are free" + (f" ({held})" if held else "")
        ask = f"ask for at most {num_free} procs per host, " if num_free else ""
        stop = "stop a mesh that holds some, " if held else ""
        text = f"{mesh!r} needs {num_procs} GPUs, one for each proc, but {free}"
        return f"{text}; {ask}{stop}or pass share_gpus=True to let procs share them"


def _all_devices(gpus: Iterable[Gpu]) -> list[Device]:
    """Every device that CUDA can open: MIG devices in the place of the GPU that they are cut from."""
    devices = list[Device]()
    for gpu in gpus:
        migs = [Device(uuid, uuid, is_mig=True) for uuid in gpu.migs]
        devices += migs or [Device(str(gpu.index), gpu.uuid)]
    return devices


def _find_device(token: str, gpus: Sequence[Gpu]) -> Device | None:
    if token.isdigit():
        return next((Device(token, gpu.uuid) for gpu in gpus if gpu.index == int(token)), None)
    named: Mapping[str, bool] = {gpu.uuid: False for gpu in gpus} | {uuid: True for gpu in gpus for uuid in gpu.migs}
    matches = [uuid for uuid in named if uuid.startswith(token)]
    if len(matches) == 1:
        return Device(token, matches[0], is_mig=named[matches[0]])
    # The older form of a MIG name: MIG-GPU-<uuid>/<instance>/<instance>.
    return Device(token, token, is_mig=True) if token.startswith("MIG-GPU-") else None


def _read_gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory_bytes = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    name, uuid = _text(nvml.nvmlDeviceGetName(handle)), _text(nvml.nvmlDeviceGetUUID(handle))
    return Gpu(index, uuid, name, memory_bytes, tuple(_read_migs(nvml, handle)))


def _read_migs(nvml: Any, handle: Any) -> list[str]:
    uuids = list[str]()
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
        count = nvml.nvmlDeviceGetMaxMigDeviceCount(handle) if current else 0
    except nvml.NVMLError:
        return []  # most GPUs know no MIG
    for number in range(count):
        try:
            uuids.append(_text(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))))
        except nvml.NVMLError:
            continue  # an empty slot
    return uuids


def _text(value: str | bytes) -> str:
    # Older releases of nvidia-ml-py answer in bytes.
    return value.decode() if isinstance(value, bytes) else value
