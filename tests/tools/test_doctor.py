"""What `danaus doctor` concludes from what it finds; and that it works on this machine."""

from __future__ import annotations

import json
from threading import Event
from typing import TYPE_CHECKING

import pytest

from danaus.runtime.host.admission import Bound, Limits, Resource
from danaus.runtime.host.devices import Gpu, GpuInventory
from danaus.tools import check_machine, check_network, check_software, doctor
from danaus.tools.check import Check, Status, render

if TYPE_CHECKING:
    from pathlib import Path

H200 = Gpu(0, "GPU-1", "H200", 139 << 30)
CPU_TORCH = {"__version__": "2.13.0+cpu", "cuda": None}
CUDA_TORCH = {"__version__": "2.13.0", "cuda": "13.0"}


def test_this_machine_can_run_danaus(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0

    out = capsys.readouterr().out
    assert "Danaus runs here." in out
    assert "XX" not in out


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0

    report = json.loads(capsys.readouterr().out)
    assert report["usable"] is True
    assert set(report["markers"]) == doctor.available_markers()
    assert all(set(check) == {"name", "status", "detail", "fix"} for check in report["checks"])


def test_every_finding_that_is_not_fine_says_what_to_do() -> None:
    checks = doctor.run_checks()

    assert [check for check in checks if check.status in {Status.WARNING, Status.MISSING} and not check.fix] == []
    assert len({check.name for check in checks}) == len(checks)


def test_something_required_that_is_missing_ends_with_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "run_checks", lambda: [Check("pyzmq", Status.MISSING, "gone", "pip install pyzmq")])

    assert doctor.main([]) == 1
    assert "Danaus does not run here until this is mended: pyzmq." in capsys.readouterr().out


def test_a_remedy_stands_below_its_finding() -> None:
    lines = list(render([Check("a", Status.OK, "fine"), Check("long", Status.WARNING, "low", "raise it")]))

    assert lines == ["ok  a     fine", "!!  long  low", "          -> raise it"]


def test_an_old_python_is_refused() -> None:
    assert check_software.check_python((3, 10, 4)).status is Status.MISSING
    assert check_software.check_python((3, 11, 0)).status is Status.OK


def test_another_system_is_refused() -> None:
    assert check_software.check_platform("darwin").status is Status.MISSING


def test_a_missing_package_names_its_remedy() -> None:
    required = check_software.check_required("no-such-package-here")
    optional = check_software.check_optional("no-such-package-here", "pip install it")

    assert (required.status, required.fix) == (Status.MISSING, "pip install no-such-package-here")
    assert (optional.status, optional.fix) == (Status.ABSENT, "pip install it")


def test_torch_is_optional_but_not_too_old() -> None:
    assert check_software.check_torch(None).status is Status.ABSENT
    assert check_software.check_torch({"__version__": "2.9.1+cu128", "cuda": "12.8"}).status is Status.WARNING
    assert check_software.check_torch(CUDA_TORCH).detail == "2.13.0, built for CUDA 13.0"


def test_gpus_are_no_use_to_a_torch_without_cuda() -> None:
    found = GpuInventory((H200,))

    assert check_software.check_gpus(found, CPU_TORCH).status is Status.WARNING
    assert check_software.check_gpus(found, CUDA_TORCH).status is Status.OK
    assert check_software.check_gpus(GpuInventory((), "no driver"), CUDA_TORCH).status is Status.ABSENT


@pytest.mark.torch
def test_torch_is_read_without_importing_it() -> None:
    import torch

    found = check_software.read_torch()

    assert found is not None
    assert (found["__version__"], found["cuda"]) == (torch.__version__, torch.version.cuda)


@pytest.mark.parametrize(("gpus", "torch", "expected"), [(0, CUDA_TORCH, set()), (1, CPU_TORCH, set()),
    (1, CUDA_TORCH, {"gpu"}), (2, CUDA_TORCH, {"gpu", "multi_gpu"}), (2, None, set())])  # fmt: skip
def test_gpu_tests_need_gpus_and_a_torch_for_them(
    gpus: int, torch: dict[str, str | None] | None, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "read_torch", lambda: torch)
    monkeypatch.setattr(doctor, "read_gpus", lambda: GpuInventory((H200,) * gpus))

    markers = doctor.available_markers.__wrapped__()

    assert markers & {"gpu", "multi_gpu"} == expected
    assert ("torch" in markers) == (torch is not None)


def test_few_open_files_are_worth_a_warning() -> None:
    assert check_machine.check_open_files(1024, 524288).status is Status.WARNING
    assert check_machine.check_open_files(-1, -1).detail == "unlimited (hard limit unlimited)"


def test_the_tightest_bound_counts() -> None:
    limits = Limits(
        (
            Bound(Resource.TASKS, "kernel.pid_max", 32768, 100, "raise pid_max"),
            Bound(Resource.TASKS, "cgroup /job", 100, 98, "raise pids.max"),
        )
    )

    found = check_machine.check_bound(limits, Resource.TASKS)

    assert (found.status, found.fix) == (Status.MISSING, "raise pids.max")
    assert found.detail == "2 of 100 free (cgroup /job)"
    assert check_machine.check_room(limits).status is Status.MISSING


def test_a_containers_default_shared_memory_is_called_small() -> None:
    bound = Bound(Resource.SHARED_MEMORY, "/dev/shm", 64 << 20, 0, "enlarge it")

    assert check_machine.check_shm(Limits((bound,))).status is Status.WARNING
    assert check_machine.check_shm(Limits(())).status is Status.WARNING


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_a_cpu_quota_is_read_from_both_cgroups(files: dict[str, str], cpus: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    assert check_machine._cpu_quota(tmp_path) == cpus


def test_siblings_are_really_tried() -> None:
    assert [check.name for check in check_machine.check_siblings()] == ["shared memory", "process_vm_readv"]


def test_py_spy_is_really_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = tmp_path / "py-spy"
    refused.write_text("#!/bin/sh\necho 'Error: Permission denied: try again as root' >&2\nexit 1\n")
    refused.chmod(0o755)

    monkeypatch.setattr(check_software, "find_py_spy", lambda: str(refused))
    assert check_software.check_py_spy().detail.endswith(
        "cannot look at another process: Permission denied: try again as root"
    )
    monkeypatch.setattr(check_software, "find_py_spy", lambda: None)
    assert check_software.check_py_spy().status is Status.ABSENT


def test_a_socket_directory_must_be_writable_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANAUS_SOCKET_DIR", "/tmp/" + "x" * 60)

    assert check_network.check_socket_directory("/tmp").status is Status.WARNING
    assert check_network.check_socket_directory("/no/such/place").status is Status.MISSING


DNS = "passwd: files\nhosts: files dns\n"


@pytest.mark.parametrize(
    ("hosts", "nsswitch", "took_s", "status"),
    [
        ("127.0.0.1 localhost\n", DNS, 0.002, Status.WARNING),
        ("127.0.0.1 localhost\n::ffff:127.0.0.1 localhost  # for torch\n", DNS, 0.0001, Status.OK),
        ("::ffff:7f00:1 localhost\n", DNS, 0.0001, Status.OK),
        ("# ::ffff:127.0.0.1 localhost\nnonsense\n", DNS, 0.0001, Status.WARNING),
        ("127.0.0.1 localhost\n", "hosts: files  # dns\n", 0.0001, Status.OK),
        ("127.0.0.1 localhost\n", "", 0.0001, Status.WARNING),
        ("::ffff:127.0.0.1 localhost\n", DNS, 2.0, Status.WARNING),
    ],
)
def test_asking_a_name_server_about_loopback_is_worth_a_warning(
    hosts: str, nsswitch: str, took_s: float, status: Status
) -> None:
    assert check_network.check_reverse_lookup(hosts, nsswitch, (took_s, "localhost")).status is status


def test_a_lookup_that_hangs_does_not_hang_the_doctor() -> None:
    release = Event()

    took_s, answer = check_network._time(lambda: str(release.wait(10)), limit_s=0.01)
    release.set()

    assert answer is None
    assert took_s < 5


def test_streams_without_encryption_are_told_of_by_their_switch() -> None:
    assert check_network.check_streams(is_plain=False, has_nixl=False).status is Status.OK
    told = check_network.check_streams(is_plain=True, has_nixl=True)

    assert told.status is Status.WARNING
    assert "DANAUS_PLAIN_BULK and DANAUS_NIXL" in str(told.fix)
