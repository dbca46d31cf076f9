"""A sync with real receivers: each process stands for a host, with a folder of its own for the copy."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from danaus import ProcMesh, SupervisionError, testing, this_host
from danaus.runtime.workspace import sending as module
from danaus.runtime.workspace.errors import WorkspaceError
from danaus.runtime.workspace.paths import workspace_of
from danaus.runtime.workspace.progress import Progress, show_progress
from danaus.runtime.workspace.receiver import Receiver
from danaus.runtime.workspace.sending import Sending, SyncReport
from danaus.runtime.workspace.snapshot import Snapshot
from danaus.runtime.workspace.sync import sync

from .trees import read, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NUM_HOSTS = 3
LIMIT_S = 15.0


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process notes what it has read."""
    monkeypatch.setenv("DANAUS_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture(scope="module")
def procs() -> Iterator[ProcMesh]:
    """One process for each host."""
    mesh = this_host().spawn_procs({"hosts": NUM_HOSTS}, name="hosts", preload=[], gpus="none")
    yield mesh
    mesh.stop().get(timeout=LIMIT_S)


class Cluster:
    """A working directory, and hosts that it is sent to."""

    def __init__(self, tmp_path: Path, procs: ProcMesh) -> None:
        self.laptop = write(tmp_path / "laptop/proj", {})
        self.bases = [tmp_path / f"host{index}" for index in range(len(procs))]
        self.procs = procs
        self._receivers: Any = None

    def receivers(self) -> Any:
        """Actors as a sync makes them."""
        return self.procs.spawn("sync", Receiver, "proj", [str(base) for base in self.bases])

    def sync(self, tell: Callable[[Progress], object] = lambda _: None, *, limit_s: float = LIMIT_S) -> SyncReport:
        """Send the directory to all."""
        snapshot, receivers = Snapshot(workspace_of(str(self.laptop), slot=0), "laptop"), self.receivers()
        try:
            snapshot.take()
            return Sending(receivers, snapshot.top, snapshot.manifest, time.monotonic() + limit_s, tell).run()
        finally:
            snapshot.close()
            receivers.stop().exception(timeout=LIMIT_S)

    def copies(self) -> list[dict[str, bytes]]:
        """What each host holds."""
        return [read(base / "copy") for base in self.bases]


@pytest.fixture
def cluster(tmp_path: Path, procs: ProcMesh) -> Cluster:
    """The same hosts for all tests, with nothing on them."""
    return Cluster(tmp_path, procs)


TREE = {"train.py": b"import lib", "lib/__init__.py": b"", "lib/model.py": b"x" * 1000, "run*": b"#!", "link@": b"lib"}


def test_all_hosts_get_all_files_and_the_next_time_none(cluster: Cluster) -> None:
    write(cluster.laptop, TREE)

    first, second = cluster.sync(), cluster.sync()

    assert cluster.copies() == [TREE] * NUM_HOSTS
    assert (first.hosts, first.files_sent, first.files_written) == (NUM_HOSTS, 5, 5)
    assert first.bytes_sent == sum(map(len, TREE.values()))
    assert second == SyncReport(hosts=NUM_HOSTS)


def test_of_an_edit_only_the_changed_file_travels(cluster: Cluster) -> None:
    write(cluster.laptop, TREE)
    cluster.sync()
    write(cluster.laptop, {"train.py": b"import lib, sys"})
    (cluster.laptop / "lib/model.py").unlink()

    report = cluster.sync()

    assert report == SyncReport(hosts=NUM_HOSTS, files_sent=1, bytes_sent=15, files_written=1, files_deleted=1)
    assert cluster.copies() == [read(cluster.laptop)] * NUM_HOSTS


def test_a_host_that_lacks_more_than_the_others_gets_that_alone(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(cluster.laptop, TREE)
    cluster.sync()
    (cluster.bases[1] / "copy/lib/model.py").write_bytes(b"spoilt")
    write(cluster.laptop, {"train.py": b"new"})
    slices = []
    real = module.targets
    monkeypatch.setattr(module, "targets", lambda *args: slices.extend(real(*args)) or slices[-1:])

    report = cluster.sync()

    assert (report.files_sent, report.files_written) == (2, 2)
    assert sorted((part.start, part.stop) for part in slices) == [(0, 3), (1, 2)]
    assert cluster.copies() == [read(cluster.laptop)] * NUM_HOSTS


def test_large_files_and_long_lists_travel_in_parts(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 1000)
    tree = {"large.bin": os.urandom(50_500)} | {f"m{index}.py": os.urandom(10) for index in range(300)}
    write(cluster.laptop, tree)
    told: list[Progress] = []

    report = cluster.sync(told.append)

    assert cluster.copies() == [tree] * NUM_HOSTS
    assert (report.files_sent, report.bytes_sent) == (301, 53_500)
    assert [each.bytes_sent for each in told] == sorted({each.bytes_sent for each in told})
    assert (told[0], told[-1]) == (Progress(0, 53_500, 301, 3), Progress(53_500, 53_500, 301, 3))
    assert len(told) > 50


def test_an_edit_meanwhile_does_not_mix_with_what_is_sent(cluster: Cluster) -> None:
    write(cluster.laptop, TREE)

    def edit(_progress: Progress) -> None:
        write(cluster.laptop, {"train.py": b"edited", "run.log": b"one more line"})
        (cluster.laptop / "lib/model.py").unlink(missing_ok=True)

    cluster.sync(edit)
    copies = cluster.copies()
    cluster.sync()

    assert copies == [TREE] * NUM_HOSTS
    assert cluster.copies() == [read(cluster.laptop)] * NUM_HOSTS


def test_two_controllers_at_once_leave_whole_trees(cluster: Cluster) -> None:
    write(cluster.laptop, {f"{index}.py": os.urandom(20) for index in range(100)})
    reports: list[SyncReport] = []
    threads = [threading.Thread(target=lambda: reports.append(cluster.sync())) for _ in range(3)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)

    assert len(reports) == len(threads)
    assert cluster.copies() == [read(cluster.laptop)] * NUM_HOSTS
    assert cluster.sync().files_written == 0


def test_nothing_is_left_of_a_sync_but_the_copy_and_notes_about_it(cluster: Cluster) -> None:
    write(cluster.laptop, TREE)

    cluster.sync()

    assert {entry.name for entry in cluster.bases[0].iterdir()} == {"copy", "lock", "record", "root"}


# what goes wrong:


def test_a_host_that_cannot_write_is_named(cluster: Cluster) -> None:
    write(cluster.laptop, TREE)
    write(cluster.bases[1], {"copy/train.py/kept": b"by a program"})

    with pytest.raises(WorkspaceError, match=rf"host {os.uname().nodename}: .*host1/copy/train.py is a file"):
        cluster.sync()


def test_a_folder_that_cannot_be_made_is_told(cluster: Cluster) -> None:
    cluster.bases[2].touch()

    with pytest.raises(WorkspaceError, match=r"host .*: .*Not a directory.*host2"):
        cluster.sync()


def test_a_host_that_dies_fails_the_sync_at_once(tmp_path: Path) -> None:
    procs = this_host().spawn_procs({"hosts": 2}, name="mortal", preload=[], gpus="none")
    cluster = Cluster(tmp_path, procs)
    write(cluster.laptop, TREE)

    def kill(_progress: Progress) -> None:
        testing.kill(procs, 1)

    started_s = time.monotonic()
    with pytest.raises(SupervisionError):
        cluster.sync(kill)

    assert time.monotonic() - started_s < LIMIT_S / 2
    assert cluster.copies()[1] == {}
    procs.stop().get(timeout=LIMIT_S)


def test_a_sync_ends_with_its_time(cluster: Cluster) -> None:
    write(cluster.laptop, TREE)

    with pytest.raises(TimeoutError):
        cluster.sync(limit_s=0.0)


def test_this_host_has_the_files_already(tmp_path: Path) -> None:
    assert sync(this_host(), tmp_path).hosts == 0


def test_a_list_of_rules_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"ignore=\['\*\.pt'\]"):
        sync(this_host(), tmp_path, ignore="*.pt")


def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"nowhere'\): there is no such directory here"):
        sync(this_host(), tmp_path / "nowhere")


def test_on_an_event_loop_the_way_out_is_told(tmp_path: Path) -> None:
    async def call() -> None:
        sync(this_host(), tmp_path)

    with pytest.raises(RuntimeError, match=r"asyncio\.to_thread"):
        asyncio.run(call())


# what is shown:


def test_a_report_reads_well() -> None:
    one = SyncReport(hosts=1, files_sent=1, bytes_sent=10, seconds=0.1)
    many = SyncReport(hosts=64, files_sent=3, bytes_sent=3 << 20, files_deleted=2, seconds=1.5, skipped=("a", "b"))

    assert str(one) == "1 file (10 B) sent to 1 host in 0.10 s, 0 deleted"
    assert str(many) == "3 files (3.0 MiB) sent to 64 hosts in 1.50 s, 2 deleted, 2 left out"


def test_progress_goes_to_whoever_asked_for_it_and_else_nowhere() -> None:
    told: list[Progress] = []
    progress = Progress(1, 2, 3, 4)

    with show_progress(told.append) as tell:
        tell(progress)
    with show_progress(None) as tell:
        tell(progress)

    assert told == [progress]


def test_on_a_terminal_a_bar_is_shown_once_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    from danaus.runtime.workspace import progress as shown

    leader, follower = os.openpty()
    with open(follower, "w", encoding="utf-8") as terminal, open(leader, "rb", buffering=0) as screen:
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        with show_progress(None) as tell:
            tell(Progress(0, 1000, 3, 64))
            monkeypatch.setattr(shown, "QUIET_S", 0.0)
            tell(Progress(500, 1000, 3, 64))
        terminal.write("the end")
        terminal.flush()

        seen = b""
        while b"the end" not in seen:
            seen += screen.read(4096)

    assert b"3 files to 64 hosts" in seen
