"""GPUs of a host: reading them from a fake driver, what each proc sees, and who holds what."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from danaus.runtime.host.devices import (
    Device,
    DeviceLeases,
    Gpu,
    GpuInventory,
    device_env,
    read_gpus,
    usable_devices,
    visible_devices,
)

GPUS = [Gpu(index, f"GPU-{letter}000-1111", "H200", 141 << 30) for index, letter in enumerate("abcd")]
MIGS = [Gpu(0, "GPU-a000", "A100", 40 << 30, ("MIG-1111", "MIG-2222")), Gpu(1, "GPU-b000", "A100", 40 << 30)]


class FakeNvmlError(Exception):
    pass


def fake_nvml(gpus: list[Gpu], **overrides: Any) -> SimpleNamespace:
    """A driver with the given GPUs, answering as nvidia-ml-py does; ``shutdowns`` counts how often it was left."""

    def mig_handle(gpu: Gpu, number: int) -> SimpleNamespace:
        if number >= len(gpu.migs):
            raise FakeNvmlError("not found")
        return SimpleNamespace(uuid=gpu.migs[number])

    def mig_mode(gpu: Gpu) -> tuple[int, int]:
        if not gpu.migs:
            raise FakeNvmlError("not supported")
        return 1, 1

    fake = SimpleNamespace(shutdowns=0, NVMLError=FakeNvmlError)
    fake.nvmlInit = lambda: None
    fake.nvmlShutdown = lambda: setattr(fake, "shutdowns", fake.shutdowns + 1)
    fake.nvmlDeviceGetCount = lambda: len(gpus)
    fake.nvmlDeviceGetHandleByIndex = lambda index: gpus[index]
    fake.nvmlDeviceGetMemoryInfo = lambda gpu: SimpleNamespace(total=gpu.memory_bytes)
    fake.nvmlDeviceGetName = lambda gpu: gpu.name.encode()
    fake.nvmlDeviceGetUUID = lambda handle: handle.uuid
    fake.nvmlDeviceGetMigMode = mig_mode
    fake.nvmlDeviceGetMaxMigDeviceCount = lambda _: 7
    fake.nvmlDeviceGetMigDeviceHandleByIndex = mig_handle
    vars(fake).update(overrides)
    return fake


def visible(own: int, devices: tuple[Device, ...]) -> str:
    return device_env(own, devices)["CUDA_VISIBLE_DEVICES"]


def tokens(existing: str | None, gpus: list[Gpu] = GPUS) -> list[str]:
    return [device.token for device in usable_devices(gpus, existing=existing)]


def test_the_drivers_gpus_are_read_with_their_mig_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake_nvml(MIGS)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)

    assert read_gpus() == GpuInventory(tuple(MIGS))
    assert nvml.shutdowns == 1


def test_without_the_library_or_driver_there_are_no_gpus_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise FakeNvmlError("Driver Not Loaded")

    def lost() -> int:
        raise FakeNvmlError("GPU is lost")

    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_gpus() == GpuInventory((), "nvidia-ml-py is not installed: pip install 'danaus[gpu]'")

    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([], nvmlInit=no_driver))
    assert read_gpus() == GpuInventory((), "the NVIDIA driver does not answer: Driver Not Loaded")

    nvml = fake_nvml([], nvmlDeviceGetCount=lost)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert read_gpus() == GpuInventory((), "the NVIDIA driver failed: GPU is lost")
    assert nvml.shutdowns == 1

    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([]))
    assert read_gpus() == GpuInventory((), "the NVIDIA driver reports no GPU")


def test_a_proc_sees_its_own_gpu_first_and_then_the_hosts_others() -> None:
    devices = usable_devices(GPUS, existing=None)

    assert [visible(own, devices) for own in range(4)] == ["0,1,2,3", "1,2,3,0", "2,3,0,1", "3,0,1,2"]
    assert device_env(0, devices)["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_what_the_operator_made_visible_is_all_there_is_in_the_operators_order() -> None:
    devices = usable_devices(GPUS, existing="3, 1")

    assert [visible(own, devices) for own in range(2)] == ["3,1", "1,3"]
    assert [device.uuid for device in devices] == [GPUS[3].uuid, GPUS[1].uuid]


def test_uuids_may_be_abbreviated_and_stay_as_they_were_written() -> None:
    devices = usable_devices(GPUS, existing=f"GPU-c,{GPUS[0].uuid}")

    assert visible(1, devices) == f"{GPUS[0].uuid},GPU-c"
    assert devices[0].uuid == GPUS[2].uuid


@pytest.mark.parametrize(("existing", "seen"), [("", []), ("-1", []), ("2,-1,3", ["2"]), ("NoDevFiles", [])])
def test_hidden_gpus_stay_hidden(existing: str, seen: list[str]) -> None:
    assert tokens(existing) == seen


def test_devices_that_do_not_exist_or_come_twice_are_refused() -> None:
    with pytest.raises(ValueError, match=r"this host has no device '7'; it has 0 \(GPU-a000-1111\), 1 "):
        usable_devices(GPUS, existing="0,7")
    with pytest.raises(ValueError, match="no device 'GPU-'"):
        usable_devices(GPUS, existing="GPU-")  # an ambiguous abbreviation
    with pytest.raises(ValueError, match="it has none"):
        usable_devices([], existing="0")
    with pytest.raises(ValueError, match="'GPU-a' twice"):
        usable_devices(GPUS, existing="0,GPU-a")


def test_mig_devices_stand_in_for_their_gpu_and_are_seen_alone() -> None:
    devices = usable_devices(MIGS, existing=None)

    assert [device.token for device in devices] == ["MIG-1111", "MIG-2222", "1"]
    assert [visible(own, devices) for own in range(3)] == ["MIG-1111", "MIG-2222", "1"]
    assert tokens("MIG-2", MIGS) == ["MIG-2"]
    assert tokens("MIG-GPU-a000/1/0", MIGS) == ["MIG-GPU-a000/1/0"]


def test_procs_of_one_mesh_get_a_gpu_each() -> None:
    devices = usable_devices(GPUS, existing=None)

    assert [visible_devices(rank, 2, devices)["CUDA_VISIBLE_DEVICES"] for rank in range(2)] == ["0,1,2,3", "1,2,3,0"]
    with pytest.raises(ValueError, match="rank 2 is not among the 2 procs"):
        visible_devices(2, 2, devices)


def test_more_procs_than_gpus_share_only_if_asked() -> None:
    devices = usable_devices(GPUS, existing="0,1")

    with pytest.raises(
        ValueError, match=r"needs 3 GPUs.* 2 of this host's 2 GPUs are free; .*at most 2.*share_gpus=True"
    ):
        visible_devices(0, 3, devices)

    seen = [visible_devices(rank, 3, devices, share_gpus=True)["CUDA_VISIBLE_DEVICES"] for rank in range(3)]
    assert seen == ["0,1", "1,0", "0,1"]


def test_a_host_without_gpus_changes_no_environment() -> None:
    assert visible_devices(0, 8, ()) == {}
    assert DeviceLeases(()).acquire("w", 8) == ()


def test_two_meshes_never_share_a_gpu_unasked() -> None:
    leases = DeviceLeases(usable_devices(GPUS, existing=None))

    assert leases.acquire("trainers", 3) == (0, 1, 2)
    with pytest.raises(ValueError, match=r"'engines' needs 2 GPUs.* 1 of this host's 4 .*\('trainers' holds 0-2\)"):
        leases.acquire("engines", 2)
    assert leases.holders() == {"trainers": (0, 1, 2)}
    assert leases.acquire("engines", 1) == (3,)


def test_released_gpus_can_be_leased_again() -> None:
    leases = DeviceLeases(usable_devices(GPUS, existing=None))
    leases.acquire("a", 2)
    leases.acquire("b", 2)

    leases.release("a")
    leases.release("unknown")

    assert leases.acquire("c", 2) == (0, 1)


def test_sharing_procs_take_the_least_used_gpus_and_keep_others_from_having_them_alone() -> None:
    leases = DeviceLeases(usable_devices(GPUS, existing=None))
    leases.acquire("a", 2)

    assert leases.acquire("b", 3, share_gpus=True) == (2, 3, 0)

    leases.release("a")
    assert leases.acquire("c", 1) == (1,)
    with pytest.raises(ValueError, match="0 of this host's 4 GPUs are free"):
        leases.acquire("d", 1)
