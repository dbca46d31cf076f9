"""Whose doing a SIGKILL was: counters on sample texts and a fake tree, and one real kill in a real cgroup."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from danaus.runtime.host.oom import MEMORY_S, OomTally, OomWatch, be_likelier

if TYPE_CHECKING:
    from collections.abc import Iterator

V1_GROUP = "4:memory:/job\n1:cpu:/\n0::/\n"
V2_GROUP = "0::/job/step\n"
V1_MOUNTS = "30 20 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V2_MOUNTS = "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n"


class Machine:
    """A fake tree of /proc and /sys."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def v1(self, kills: int, *, group: str = "job") -> None:
        self.write("proc/self/cgroup", V1_GROUP)
        self.write("proc/self/mountinfo", V1_MOUNTS)
        self.write(f"sys/fs/cgroup/memory/{group}/memory.limit_in_bytes", f"{300 << 20}\n")
        text = f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n"
        self.write(f"sys/fs/cgroup/memory/{group}/memory.oom_control", text)

    def v2(self, kills: int) -> None:
        self.write("proc/self/cgroup", V2_GROUP)
        self.write("proc/self/mountinfo", V2_MOUNTS)
        self.write("sys/fs/cgroup/job/memory.max", f"{300 << 20}\n")
        self.write("sys/fs/cgroup/job/step/memory.max", "max\n")
        text = f"low 0\nhigh 0\nmax 12\noom 3\noom_kill {kills}\noom_group_kill 0\n"
        self.write("sys/fs/cgroup/job/step/memory.events", text)

    def vmstat(self, kills: int) -> None:
        self.write("proc/self/cgroup", "0::/\n")
        self.write("proc/self/mountinfo", V2_MOUNTS)
        self.write("proc/vmstat", f"nr_free_pages 9\noom_kill {kills}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("kind", ["v1", "v2", "vmstat"])
def test_a_counter_that_grew_names_the_kill_and_one_that_did_not_does_not(machine: Machine, kind: str) -> None:
    count = getattr(machine, kind)
    count(5)
    watch = OomWatch(str(machine.root))

    assert watch.on_killed("a.0", now_s=1.0) == ""

    count(6)
    said = watch.on_killed("a.1", now_s=2.0)
    assert "counts 6 such kills" in said
    assert watch.on_killed("a.2", now_s=2.0) == ""


def test_the_limit_is_named_which_may_be_a_parents(machine: Machine) -> None:
    machine.v2(0)
    watch = OomWatch(str(machine.root))
    machine.v2(1)

    assert watch.on_killed("a.0", now_s=1.0).startswith("cgroup /job may use 300 MiB (")


def test_without_a_limit_it_was_the_machine(machine: Machine) -> None:
    machine.vmstat(0)
    watch = OomWatch(str(machine.root))
    machine.vmstat(1)

    assert "the machine had run out" in watch.on_killed("a.0", now_s=1.0)


def test_a_process_in_a_cgroup_of_its_own_is_looked_for_there(machine: Machine) -> None:
    machine.v1(0)
    watch = OomWatch(str(machine.root))
    machine.write("proc/77/cgroup", V1_GROUP.replace("/job", "/other"))
    machine.v1(3, group="other")
    watch.on_started("a.0", 77)
    watch.on_started("a.1", 78)

    machine.v1(4, group="other")

    assert watch.on_killed("a.1", now_s=1.0) == ""
    assert "other" in watch.on_killed("a.0", now_s=1.0)


def test_a_machine_that_says_nothing_is_no_error(machine: Machine) -> None:
    watch = OomWatch(str(machine.root))
    watch.look(now_s=1.0)

    assert watch.on_killed("a.0", now_s=1.0) == ""


def test_one_kill_explains_one_death() -> None:
    tally = OomTally(2)
    tally.on_count(4, now_s=1.0)

    assert [tally.take(now_s=2.0) for _ in range(3)] == [True, True, False]


def test_a_kill_of_long_ago_explains_nothing() -> None:
    tally = OomTally(0)
    tally.on_count(1, now_s=1.0)

    assert not tally.take(now_s=1.5 + MEMORY_S)


def test_a_counter_that_starts_anew_is_no_growth() -> None:
    tally = OomTally(7)
    tally.on_count(0, now_s=1.0)

    assert not tally.take(now_s=1.0)


def test_procs_go_first_up_to_the_most_that_there_is(tmp_path: Path) -> None:
    file = tmp_path / "oom_score_adj"
    for before, after in (("0\n", 100), ("950\n", 1000), ("-500\n", -400)):
        file.write_text(before)
        be_likelier(str(file))
        assert int(file.read_text()) == after


SCRIPT = """
import os, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from danaus import Actor, SupervisionError, endpoint, this_host

class Hungry(Actor):
    @endpoint
    def eat(self):
        food = []
        while True:
            food.append(b"x" * (8 << 20))

if __name__ == "__main__":
    procs = this_host().spawn_procs({"rank": 1}, name="crew")
    hungry = procs.spawn("hungry", Hungry)
    error = hungry.eat.call_one().exception(timeout=15)
    assert isinstance(error, SupervisionError), error
    print("KIND", error.failure.kind, error.failure.signum)
    print("DETAIL", error.failure.detail)
"""


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup with little memory. Not every root may make one, so this is no matter of a marker."""
    own = re.search(r":memory:(.*)", Path("/proc/self/cgroup").read_text())
    if own is not None:
        folder, limit = Path(f"/sys/fs/cgroup/memory{own[1]}"), "memory.limit_in_bytes"
    else:
        folder, limit = Path("/sys/fs/cgroup"), "memory.max"
    folder /= f"danaus-test-{os.getpid()}"
    try:
        folder.mkdir()
        if not (folder / limit).exists():
            folder.rmdir()
            pytest.skip(f"no cgroup that is made here has {limit}")
        (folder / limit).write_text(str(200 << 20))
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    yield folder
    deadline_s = time.monotonic() + 5.0
    while True:
        for pid in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        try:
            folder.rmdir()
        except OSError:
            # What was killed is in it until it has ended.
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        else:
            return


def test_the_kernels_kill_in_a_cgroup_is_named_with_its_limit(cgroup: Path, tmp_path: Path) -> None:
    script = tmp_path / "hungry.py"
    script.write_text(SCRIPT)

    done = subprocess.run(
        [sys.executable, str(script), str(cgroup)], capture_output=True, text=True, timeout=18, check=False
    )

    assert "KIND out of memory 9" in done.stdout, done.stdout + done.stderr
    assert "may use 200 MiB" in done.stdout
