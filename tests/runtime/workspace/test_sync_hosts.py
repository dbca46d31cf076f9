"""An edit here runs there: two hosts with real daemons, each with its own copy of the working directory."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest

from danaus import Actor, HostMesh, Restart, SupervisionError, endpoint, this_host
from danaus.runtime.jobs.local_job import LocalJob
from danaus.runtime.network import attach
from danaus.runtime.workspace.paths import workspace_of
from danaus.runtime.workspace.sending import SyncReport
from danaus.runtime.workspace.sync import sync_again

from .trees import read, write

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.timeout(60)
cloudpickle.register_pickle_by_value(sys.modules[__name__])

LIMIT_S = 20.0
JOB = "sync-test"


class Reader(Actor):
    """Tells what it finds where it runs."""

    @endpoint
    def value(self, module: str) -> object:
        import importlib

        return importlib.import_module(module).VALUE

    @endpoint
    def pids(self, module: str) -> tuple[int, int]:
        """The process that imported a module, and this one."""
        import importlib

        return importlib.import_module(module).PID, os.getpid()

    @endpoint
    def place(self) -> tuple[str, list[str]]:
        return os.getcwd(), sys.path

    @endpoint
    def value_further_on(self, module: str) -> object:
        """What a process finds that this one spawns."""
        procs = this_host().spawn_procs(preload=[], gpus="none")
        found = procs.spawn("further", Reader).value.call_one(module).get(timeout=LIMIT_S)
        procs.stop().get(timeout=LIMIT_S)
        return found


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where hosts and this process keep what they note; they are all the same user's."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("state")
        patch.setenv("DANAUS_STATE_DIR", str(path))
        yield path


@pytest.fixture(scope="module")
def hosts(state: Path) -> Iterator[HostMesh]:
    """Two hosts."""
    with LocalJob(hosts=2, name=JOB) as job:
        yield job.hosts()


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which is on the search path as a script's is."""
    path = write(tmp_path / "proj", {})
    monkeypatch.chdir(path)
    monkeypatch.syspath_prepend(str(path))
    return path


def copies(state: Path, laptop: Path) -> list[Path]:
    workspace = workspace_of(str(laptop), slot=0).workspace_id
    return [state / "workspaces" / f"{JOB}-{index}" / workspace / "copy" for index in range(2)]


def ask(hosts: HostMesh, name: str, *args: Any, preload: Sequence[str] = ()) -> list[Any]:
    """What new processes say, one on each host."""
    procs = hosts.spawn_procs(preload=preload, gpus="none")
    try:
        return list(getattr(procs.spawn("reader", Reader), name).call(*args).get(timeout=LIMIT_S))
    finally:
        procs.stop().get(timeout=LIMIT_S)


def eventually(readers: Any, before: tuple[int, int]) -> list[tuple[int, int]]:
    """Who imported ``held`` on each host, once the second is another process than ``before``."""
    deadline_s = time.monotonic() + LIMIT_S
    while True:
        try:
            found = list(readers.pids.options(timeout=LIMIT_S).call("held").get())
            if found[1] != before:
                return found
        except SupervisionError:
            # Lost, and not back yet.
            assert time.monotonic() < deadline_s
        time.sleep(0.05)


def slow_down(monkeypatch: pytest.MonkeyPatch, *, until_s: float) -> None:
    """Have the next host get its files only then: the time at which its ranks are to start lies before."""

    def sync_late(*args: Any, **kwargs: Any) -> object:
        time.sleep(max(0.0, until_s - time.monotonic()))
        return sync_again(*args, **kwargs)

    monkeypatch.setattr(attach, "sync_again", sync_late)


def test_an_edit_here_is_what_new_processes_run_there(hosts: HostMesh, laptop: Path, state: Path) -> None:
    write(laptop, {"edited_a.py": b"VALUE = 1", "other.py": b"x" * 1000, "notes@": b"other.py"})
    first = hosts.sync_workspace()
    before = ask(hosts, "value", "edited_a")
    write(laptop, {"edited_a.py": b"VALUE = 2"})

    second = hosts.sync_workspace()

    assert (before, ask(hosts, "value", "edited_a")) == ([1, 1], [2, 2])
    assert (first.files_sent, second.files_sent, second.bytes_sent) == (3, 1, 9)
    assert [read(copy) for copy in copies(state, laptop)] == [read(laptop)] * 2
    assert hosts.sync_workspace().files_sent == 0


def test_processes_work_in_the_copy_and_find_it_first(hosts: HostMesh, laptop: Path, state: Path) -> None:
    write(laptop, {"src/deep.py": b"VALUE = 'deep'"})
    sys.path.insert(0, str(laptop / "src"))
    hosts.sync_workspace()

    places = ask(hosts, "place")

    expected = copies(state, laptop)
    assert [place[0] for place in places] == [str(copy) for copy in expected]
    assert [place[1][:2] for place in places] == [[str(copy / "src"), str(copy)] for copy in expected]
    assert ask(hosts, "value", "deep") == ["deep", "deep"]


def test_a_zygote_starts_again_when_what_it_preloaded_has_changed_and_only_then(hosts: HostMesh, laptop: Path) -> None:
    write(laptop, {"heavy.py": b"import os\nfrom lighter import VALUE\nPID = os.getpid()", "lighter.py": b"VALUE = 1"})
    hosts.sync_workspace()
    first = ask(hosts, "pids", "heavy", preload=["heavy"])
    hosts.sync_workspace()
    second = ask(hosts, "pids", "heavy", preload=["heavy"])
    # Not the module itself, but one that it imports.
    write(laptop, {"lighter.py": b"VALUE = 2"})
    hosts.sync_workspace()

    third = ask(hosts, "pids", "heavy", preload=["heavy"])

    zygotes = [[importer for importer, _ in pids] for pids in (first, second, third)]
    assert all(importer != pid for pids in (first, second, third) for importer, pid in pids)
    assert zygotes[0] == zygotes[1]
    assert set(zygotes[1]).isdisjoint(zygotes[2])
    assert not any(Path(f"/proc/{pid}").exists() for pid in zygotes[0])
    assert ask(hosts, "value", "heavy", preload=["heavy"]) == [2, 2]


def test_processes_that_processes_there_spawn_run_the_same_code(hosts: HostMesh, laptop: Path) -> None:
    write(laptop, {"further_on.py": b"VALUE = 'copy'"})
    hosts.sync_workspace()
    (laptop / "further_on.py").write_bytes(b"VALUE = 'laptop'")

    assert ask(hosts, "value_further_on", "further_on") == ["copy", "copy"]


def test_this_host_runs_the_directory_itself(hosts: HostMesh, laptop: Path) -> None:
    write(laptop, {"here.py": b"VALUE = 'synced'"})
    hosts.sync_workspace()
    write(laptop, {"here.py": b"VALUE = 'edited since'"})

    assert ask(this_host(), "value", "here") == ["edited since"]
    assert ask(hosts, "value", "here") == ["synced", "synced"]


def test_a_slice_of_hosts_gets_it_alone_and_a_host_without_it_gets_it_again(
    hosts: HostMesh, laptop: Path, state: Path
) -> None:
    write(laptop, {"part.py": b"VALUE = 1"})
    second = hosts.slice(hosts=slice(1, 2))

    assert second.sync_workspace().hosts == 1
    assert [copy.exists() for copy in copies(state, laptop)] == [False, True]

    shutil.rmtree(copies(state, laptop)[1].parent)
    reports = sync_again(second)

    assert any(report.files_sent == 1 for report in reports)
    assert read(copies(state, laptop)[1]) == {"part.py": b"VALUE = 1"}
    assert ask(second, "value", "part") == [1]


def test_one_host_alone_and_a_directory_that_is_not_the_current_one(hosts: HostMesh, laptop: Path) -> None:
    library = write(laptop.parent / "library", {"lib_mod.py": b"VALUE = 'lib'"})
    sys.path.insert(0, str(library))

    report = hosts.slice(hosts=0).sync_workspace(library, ignore=["*.md"])

    assert isinstance(report, SyncReport)
    assert report.hosts == 1
    assert ask(hosts.slice(hosts=0), "value", "lib_mod") == ["lib"]


@pytest.mark.parametrize("backoff_s", [0.0, 2.0])
def test_a_host_that_replaces_a_lost_one_gets_what_the_others_have_before_anything_starts_there(
    laptop: Path, state: Path, monkeypatch: pytest.MonkeyPatch, backoff_s: float
) -> None:
    write(laptop, {"held.py": b"import os\nVALUE = 'synced'\nPID = os.getpid()"})
    with LocalJob(hosts=2, name=JOB, replace_lost=1) as job:
        mesh = job.hosts()
        mesh.sync_workspace()
        policy = Restart(max_restarts=3, backoff_s=backoff_s)
        procs = mesh.spawn_procs(restart=policy, preload=["held"], gpus="none")
        readers = procs.spawn("reader", Reader)
        before = list(readers.pids.call("held").get(timeout=LIMIT_S))
        write(laptop, {"held.py": b"VALUE = 'edited since'"})
        # The next host has the name of the lost one, and so would find its copy.
        shutil.rmtree(copies(state, laptop)[1].parent)

        killed_s = time.monotonic()
        slow_down(monkeypatch, until_s=killed_s + backoff_s * 1.5)
        os.kill(job._record().launched["hosts"][1]["pid"], signal.SIGKILL)

        after = eventually(readers, before[1])
        assert list(readers.value.call("held").get(timeout=LIMIT_S)) == ["synced", "synced"]
        assert after[0] == before[0]
        assert after[1][0] != after[1][1]
        procs.stop().get(timeout=LIMIT_S)
