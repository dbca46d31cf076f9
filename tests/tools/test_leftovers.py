"""What counts as left behind, and by whom."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from danaus.tools import leftovers
from danaus.tools.leftovers import File, Process, Snapshot, Thread, take_snapshot

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = "/usr/bin/python3 -c from danaus.runtime.host.agent import main"
AGENT = Process(10, 1, 1, "python3", COMMAND)
ZYGOTE = Process(11, 1, 10, "danaus-zyg-12ab", COMMAND)
PROC = Process(12, 1, 10, "w-1.0", COMMAND)
IO = Thread(1, "danaus-io")
JOB = File("/tmp/dt/danaus-1")


def snapshot(*items: leftovers.Leftover) -> Snapshot:
    return Snapshot(frozenset(items))


def test_everything_new_counts_where_the_runtime_may_not_stay() -> None:
    after = snapshot(AGENT, ZYGOTE, PROC, IO, JOB)

    assert set(after.added_since(snapshot())) == set(after.items)


def test_the_runtime_may_stay_but_a_proc_may_not() -> None:
    after = snapshot(AGENT, ZYGOTE, PROC, IO, JOB)

    assert after.added_since(snapshot(), allow_runtime=True) == [PROC]


@pytest.mark.parametrize("name", ["w-12ab.0", "w-12ab.17", "generators-12ab"])
def test_procs_of_an_older_mesh_may_come_up_late_or_again(name: str) -> None:
    before = Snapshot(frozenset(), frozenset(["w-12ab", "generators-12ab34"]))
    after = snapshot(Process(99, 7, 10, name[:15], COMMAND))

    assert after.added_since(before, allow_runtime=True) == []
    assert after.added_since(before) == list(after.items)


@pytest.mark.parametrize("name", ["w-12ac.0", "w-12.0", "sleep", "w"])
def test_procs_of_a_newer_mesh_may_not_stay(name: str) -> None:
    before = Snapshot(frozenset(), frozenset(["w-12ab"]))
    after = snapshot(Process(99, 7, 10, name, COMMAND))

    assert after.added_since(before, allow_runtime=True) == list(after.items)


def test_a_segment_with_a_name_is_never_allowed() -> None:
    segment = File("/dev/shm/danaus-x")

    assert snapshot(segment).added_since(snapshot(), allow_runtime=True) == [segment]


def test_a_process_is_the_same_after_it_changed_its_name_and_parent() -> None:
    assert Process(5, 1, 2, "sh", "sh") == Process(5, 1, 1, "sleep", "sleep 60")
    assert Process(5, 1, 2, "sh", "sh") != Process(5, 2, 2, "sh", "sh")


def test_a_controller_is_known_by_its_io_thread() -> None:
    assert snapshot(IO).has_runtime
    assert not snapshot(AGENT).has_runtime


def test_children_are_seen_and_killed() -> None:
    before = take_snapshot()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        added = take_snapshot().added_since(before)

        assert [item.pid for item in added if isinstance(item, Process)] == [child.pid]
        leftovers.kill(added)

    assert child.returncode == -9


def test_a_pid_that_was_given_to_another_process_is_not_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        leftovers.kill([Process(child.pid, 1, 0, "", "")])

        child.communicate(b"\n")

    assert child.returncode == 0


def test_job_directories_are_looked_for_where_they_are_made(tmp_path: Path) -> None:
    before = take_snapshot([tmp_path])
    (tmp_path / "danaus-1").mkdir()
    (tmp_path / "danaus-1" / "w-12ab.boot@controller.0").touch()
    (tmp_path / "other").mkdir()

    after = take_snapshot([tmp_path])

    assert after.added_since(before) == [File(str(tmp_path / "danaus-1"))]
    assert after.meshes == {"w-12ab"}


def test_processes_of_others_do_not_count() -> None:
    pids = [item.pid for item in take_snapshot().items if isinstance(item, Process)]

    assert os.getpid() not in pids
    assert 1 not in pids
