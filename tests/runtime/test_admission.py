"""Room for processes: the arithmetic on given limits, and reading the limits from made-up /proc and /sys trees."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest

from danaus.runtime.host.admission import (
    AdmissionError,
    Bound,
    Limits,
    Need,
    Resource,
    admit,
    available_memory_bytes,
    max_procs,
    read_limits,
)

if TYPE_CHECKING:
    from pathlib import Path

MIB, GIB = 1 << 20, 1 << 30


def memory(free_bytes: int, name: str = "this machine") -> Bound:
    return Bound(Resource.MEMORY, name, 16 * GIB, 16 * GIB - free_bytes, "add memory")


def refusal(num_procs: int, need: Need, *bounds: Bound) -> AdmissionError:
    with pytest.raises(AdmissionError) as caught:
        admit(num_procs, Limits(bounds), need)
    return caught.value


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def bounds_of(root: Path, resource: Resource) -> list[tuple[str, int, int]]:
    return [(b.name, b.limit, b.used) for b in read_limits(root).bounds if b.resource is resource]


def test_as_many_procs_as_fit_are_admitted_and_one_more_is_not() -> None:
    limits, need = Limits((memory(100 * MIB),)), Need(memory_bytes=25 * MIB)

    admit(4, limits, need)

    with pytest.raises(AdmissionError):
        admit(5, limits, need)
    assert max_procs(limits, need) == 4


def test_the_refusal_shows_the_sum_the_limit_and_what_fits() -> None:
    error = refusal(500, Need(memory_bytes=25 * MIB), memory(8 * GIB, "cgroup /a/b"))

    assert str(error) == (
        "no room for 500 procs on this host; none was started:\n"
        "  memory: 500 procs x 25 MiB = 12.2 GiB, but 8 GiB is available (cgroup /a/b: limit 16 GiB, 8 GiB in use)\n"
        "  ask for at most 327, or add memory"
    )


def test_every_exceeded_bound_is_listed_and_the_tightest_says_how_many_fit() -> None:
    pids = Bound(Resource.TASKS, "cgroup /a", 100, 40, "raise pids.max")
    files = Bound(Resource.DESCRIPTORS, "RLIMIT_NOFILE", 1024, 24, "raise `ulimit -n`")

    error = refusal(200, Need(memory_bytes=MIB, tasks=3, descriptors=6), memory(GIB), pids, files)

    assert pids.name in str(error)
    assert files.name in str(error)
    assert error.max_procs == 20
    assert "200 procs x 3 = 600, but 60 are available (cgroup /a: limit 100, 40 in use)" in str(error)
    assert "200 procs x 6 = 1200, but 1000 are available" in str(error)
    assert str(error).endswith("ask for at most 20, or raise pids.max, raise `ulimit -n`")


def test_what_is_needed_once_counts_once() -> None:
    limits, need = Limits((memory(300 * MIB),)), Need(memory_bytes=50 * MIB, base_memory_bytes=200 * MIB)

    admit(2, limits, need)

    assert "3 procs x 50 MiB + 200 MiB = 350 MiB" in str(refusal(3, need, memory(300 * MIB)))
    assert "not even one fits" in str(refusal(1, need, memory(200 * MIB)))


def test_without_bounds_or_procs_everything_is_admitted() -> None:
    admit(10**9, Limits(()), Need())
    admit(0, Limits((memory(0),)), Need())

    assert max_procs(Limits(()), Need()) is None
    assert Limits(()).free(Resource.MEMORY) is None


def test_an_overdrawn_limit_leaves_nothing_rather_than_less() -> None:
    assert Bound(Resource.MEMORY, "cgroup /", 10, 20, "").free == 0


def test_the_refusal_pickles() -> None:
    error = refusal(9, Need(), memory(0))

    copy = pickle.loads(pickle.dumps(error))

    assert (str(copy), copy.num_procs, copy.max_procs) == (str(error), 9, error.max_procs)


def test_negative_needs_are_refused() -> None:
    with pytest.raises(ValueError, match="tasks=-1"):
        Need(tasks=-1)


def test_machine_memory_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    root = write_files(tmp_path, {"proc/meminfo": "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 400 kB\n"})

    assert bounds_of(root, Resource.MEMORY) == [("this machine", 1000 * 1024, 600 * 1024)]


def test_cgroups_v2_bound_memory_and_tasks_at_every_level(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/job/step"
    root = write_files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job/step\n",
            "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n",
            f"{group}/memory.max": "max\n",
            f"{group}/memory.current": "50\n",
            f"{group}/pids.max": "64\n",
            f"{group}/pids.current": "4\n",
            "sys/fs/cgroup/job/memory.max": "1000\n",
            "sys/fs/cgroup/job/memory.current": "700\n",
            "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 200\nactive_file 300\n",
            "sys/fs/cgroup/job/pids.max": "max\n",
        },
    )

    assert bounds_of(root, Resource.MEMORY) == [("cgroup /job", 1000, 500)]
    assert bounds_of(root, Resource.TASKS)[0] == ("cgroup /job/step", 64, 4)


def test_cgroups_v1_bound_memory_and_tasks_in_their_own_trees(tmp_path: Path) -> None:
    mounts = (
        "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
        "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
        "39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
    )
    root = write_files(
        tmp_path,
        {
            "proc/self/cgroup": "8:pids:/p\n4:memory:/m/n\n2:cpu,cpuacct:/\n0::/\n",
            "proc/self/mountinfo": mounts,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
            "sys/fs/cgroup/memory/m/memory.limit_in_bytes": "5000\n",
            "sys/fs/cgroup/memory/m/memory.usage_in_bytes": "900\n",
            "sys/fs/cgroup/memory/m/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
            "sys/fs/cgroup/memory/m/n/memory.limit_in_bytes": "4000\n",
            "sys/fs/cgroup/memory/m/n/memory.usage_in_bytes": "10\n",
            "sys/fs/cgroup/pids/p/pids.max": "7\n",
            "sys/fs/cgroup/pids/p/pids.current": "2\n",
        },
    )

    assert bounds_of(root, Resource.MEMORY) == [("cgroup /m/n", 4000, 10), ("cgroup /m", 5000, 800)]
    assert bounds_of(root, Resource.TASKS)[0] == ("cgroup /p", 7, 2)


@pytest.mark.parametrize("subtree", ["/docker/abc", "/../outside"])
def test_in_a_container_the_mount_point_is_the_containers_own_group(tmp_path: Path, subtree: str) -> None:
    root = write_files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/docker/abc\n",
            "proc/self/mountinfo": f"30 23 0:26 {subtree} /sys/fs/cgroup ro - cgroup2 cgroup rw\n",
            "sys/fs/cgroup/memory.max": "1000\n",
            "sys/fs/cgroup/memory.current": "300\n",
        },
    )

    assert bounds_of(root, Resource.MEMORY) == [("cgroup /docker/abc", 1000, 300)]


def test_a_machine_that_shows_nothing_bounds_nothing_but_what_the_process_was_given(tmp_path: Path) -> None:
    write_files(tmp_path, {"proc/self/status": "CapEff:\t000001ffffffffff\n"})

    assert {bound.resource for bound in read_limits(tmp_path).bounds} <= {Resource.DESCRIPTORS}


def test_kernel_wide_task_limits_count_the_tasks_of_everyone(tmp_path: Path) -> None:
    files = {"proc/loadavg": "0.00 0.01 0.05 2/345 6789\n", "proc/sys/kernel/pid_max": "32768\n"}
    files["proc/self/status"] = "CapEff:\t000001ffffffffff\n"

    assert bounds_of(write_files(tmp_path, files), Resource.TASKS) == [("kernel.pid_max", 32768, 345)]


def test_a_user_without_privileges_is_held_to_the_limit_on_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_files(tmp_path, {"proc/self/status": "Name: x\nCapEff:\t0000000000000000\n", "proc/42/task/42/x": ""})
    (root / "proc/42/task/43").mkdir()
    uid = (root / "proc/42").stat().st_uid
    monkeypatch.setattr("os.getuid", lambda: uid or 1000)
    monkeypatch.setattr("resource.getrlimit", lambda _: (10, 20))

    expected_used = 2 if uid else 0
    assert (f"RLIMIT_NPROC of user {uid or 1000}", 10, expected_used) in bounds_of(root, Resource.TASKS)


def test_this_machine_has_memory_and_descriptor_limits_that_make_sense() -> None:
    limits = read_limits()

    assert available_memory_bytes() > 0
    assert (limits.free(Resource.MEMORY) or 0) > 0
    assert {bound.resource for bound in limits.bounds} >= {Resource.MEMORY, Resource.TASKS}
    assert all(bound.limit > 0 for bound in limits.bounds)
