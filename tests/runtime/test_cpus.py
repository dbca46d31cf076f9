"""CPU binding: lists as numactl and taskset write them, even shares, and binding a real process."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from danaus.runtime.host.cpus import Binding, Topology, partition_cpus, read_topology, resolve_bindings

if TYPE_CHECKING:
    from pathlib import Path

# Two nodes of four, and one that has only memory.
TWO_NODES = Topology({0: (0, 1, 2, 3), 1: (4, 5, 6, 7), 2: ()})

BIND = """
import os, sys
from danaus.runtime.host.cpus import Binding, apply_binding
cpu = min(os.sched_getaffinity(0))
problem = apply_binding(Binding(frozenset({cpu}), frozenset({0})))
assert os.sched_getaffinity(0) == {cpu}
if problem is None:
    with open("/proc/self/numa_maps") as maps:
        assert any(" bind:0 " in line for line in maps)
print(problem)
"""


def bound(entry: dict[str, str | int], topology: Topology = TWO_NODES) -> Binding:
    (binding,) = resolve_bindings([entry], num_procs=1, topology=topology)
    return binding


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("3", {3}),
        (3, {3}),
        ("0-2,7", {0, 1, 2, 7}),
        ("0-6:2", {0, 2, 4, 6}),
        ("all", set(range(8))),
        ("!0-5", {6, 7}),
    ],
)
@pytest.mark.parametrize("key", ["physcpubind", "cpus"])
def test_cpu_lists_read_as_numactl_and_taskset_read_them(key: str, text: str | int, cpus: set[int]) -> None:
    assert bound({key: text}) == Binding(frozenset(cpus))


def test_relative_lists_count_among_the_usable_cpus() -> None:
    assert bound({"physcpubind": "+0,2"}, Topology({0: (4, 6, 9)})).cpus == {4, 9}


def test_nodes_bind_their_cpus_or_their_memory() -> None:
    assert bound({"cpunodebind": "1", "membind": "2"}) == Binding(frozenset({4, 5, 6, 7}), frozenset({2}))
    assert bound({"membind": "0-1"}) == Binding(None, frozenset({0, 1}))


def test_keys_that_choose_cpus_narrow_each_other() -> None:
    assert bound({"cpunodebind": 0, "physcpubind": "2-5"}).cpus == {2, 3}


def test_each_proc_has_its_own_entry_and_an_empty_one_leaves_it_free() -> None:
    bindings = resolve_bindings([{"cpus": "1"}, {}], num_procs=2, topology=TWO_NODES)

    assert bindings == (Binding(frozenset({1})), Binding())
    with pytest.raises(ValueError, match=r"2 entries for 3 procs per host; give one dict for each proc"):
        resolve_bindings([{}, {}], num_procs=3, topology=TWO_NODES)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"cpu": "0"}, "unknown key 'cpu'; there are cpunodebind, physcpubind, cpus, membind"),
        ({"cpus": "8"}, "cpus='8': only 0,1,2,3,4,5,6,7 can be used here"),
        ({"cpunodebind": "3"}, "cpunodebind='3': only 0,1,2 can be used here"),
        ({"cpus": "+8"}, "only 0,1,2,3,4,5,6,7 can be used"),
        ({"cpus": "zero"}, "is no list of numbers such as"),
        ({"cpus": "-1"}, "is no list of numbers such as"),
        ({"cpus": ""}, "chooses nothing"),
        ({"cpus": "3-1"}, "chooses nothing"),
        ({"cpus": "!all"}, "chooses nothing"),
        ({"cpunodebind": "2"}, "leaves no CPU"),
        ({"cpunodebind": "0", "cpus": "7"}, "leaves no CPU; usable are 0,1,2"),
    ],
)
def test_bindings_that_cannot_be_had_are_refused(entry: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=r"proc_bind\[0\]") as caught:
        resolve_bindings([entry], num_procs=1, topology=TWO_NODES)

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("num_procs", "shares"),
    [
        (0, []),
        (1, [{0, 1, 2, 3, 4, 5, 6, 7}]),
        (2, [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        (3, [{0, 1}, {2, 3, 4}, {5, 6, 7}]),
        (8, [{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}]),
    ],
)
def test_cpus_are_shared_out_evenly_and_by_node(num_procs: int, shares: list[set[int]]) -> None:
    assert list(partition_cpus(num_procs, TWO_NODES)) == shares


def test_with_more_procs_than_cpus_neighbours_share_one() -> None:
    assert list(partition_cpus(5, Topology({0: (0, 1)}))) == [{0}, {0}, {0}, {1}, {1}]


def test_the_topology_keeps_threads_of_a_core_together_and_leaves_out_what_is_not_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = tmp_path / "sys/devices/system"
    for node, cpus in ((0, "0-3\n"), (1, "\n")):
        (system / f"node/node{node}").mkdir(parents=True)
        (system / f"node/node{node}/cpulist").write_text(cpus)
    for cpu in range(4):
        (system / f"cpu/cpu{cpu}/topology").mkdir(parents=True)
        (system / f"cpu/cpu{cpu}/topology/thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})

    assert read_topology(tmp_path) == Topology({0: (0, 2, 1), 1: ()})
    assert read_topology(tmp_path / "nothing") == Topology({0: (0, 1, 2)})


def test_this_machines_topology_holds_the_cpus_of_this_process() -> None:
    assert set(read_topology().cpus) == os.sched_getaffinity(0)


def test_a_process_binds_itself() -> None:
    done = subprocess.run([sys.executable, "-c", BIND], capture_output=True, text=True, check=False, timeout=15)

    assert done.returncode == 0, done.stderr
