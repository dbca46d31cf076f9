"""What is sent is what the directory held at one moment, kept on the host that sent it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from danaus.runtime.workspace import snapshot as module
from danaus.runtime.workspace.errors import WorkspaceError, WorkspaceTooLarge
from danaus.runtime.workspace.paths import Workspace, workspace_of
from danaus.runtime.workspace.scan import Limits, scan
from danaus.runtime.workspace.snapshot import ATTEMPTS, Snapshot

from .trees import read, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TREE = {"a.py": b"1", "bin/run*": b"#!", "d/link@": b"../a.py", "large.bin": bytes(range(256)) * 50}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is kept."""
    monkeypatch.setenv("DANAUS_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(module, "_PIECE_BYTES", 1000)
    return tmp_path / "state"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The directory."""
    return write(tmp_path / "work", TREE)


@pytest.fixture
def snapshot(work: Path) -> Iterator[Snapshot]:
    """Of it, not taken yet."""
    made = Snapshot(workspace_of(str(work), slot=0), "laptop")
    yield made
    made.close()


def before_reading(monkeypatch: pytest.MonkeyPatch, edit: Callable[[], object]) -> None:
    """Have ``edit`` called after each scan, before files are read."""

    def scan_and_edit(*args: object, **kwargs: object) -> object:
        found = scan(*args, **kwargs)  # type: ignore[arg-type]
        edit()
        return found

    monkeypatch.setattr(module, "scan", scan_and_edit)


def test_it_holds_what_the_directory_held(snapshot: Snapshot, work: Path) -> None:
    snapshot.take()
    write(work, {"a.py": b"edited"})

    assert scan(snapshot.top).manifest.entries == snapshot.manifest.entries
    assert read(snapshot._copy.top) == TREE


def test_it_follows_the_directory_and_reads_only_what_changed(
    snapshot: Snapshot, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot.take()
    write(work, {"a.py": b"edited"})
    (work / "large.bin").unlink()
    pieces = []
    monkeypatch.setattr(snapshot._copy, "put", lambda *piece: pieces.append(piece) or real(*piece))
    real = type(snapshot._copy).put.__get__(snapshot._copy)

    snapshot.take()

    assert [data for _, _, data in pieces] == [b"edited"]
    assert list(snapshot.manifest.entries) == ["a.py", "bin/run", "d/link"]


def test_a_file_that_changes_before_it_is_read_is_taken_as_it_is_last(
    snapshot: Snapshot, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = iter([b"once", b"twice"])
    before_reading(monkeypatch, lambda: [write(work, {"a.py": content}) for content in [next(edits, None)] if content])

    snapshot.take()

    assert (snapshot._copy.top / "a.py").read_bytes() == b"twice"


def test_files_that_never_stop_changing_are_told(
    snapshot: Snapshot, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = iter(range(1000))
    before_reading(monkeypatch, lambda: write(work, {"busy.txt": b"%04d" % next(numbers)}))
    write(work, {"busy.txt": b"...."})

    with pytest.raises(WorkspaceError, match=f"kept changing while they were read, {ATTEMPTS} times"):
        snapshot.take()

    assert read(snapshot._copy.top) == {}


def test_a_log_that_only_grows_is_no_trouble(snapshot: Snapshot, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(work, {"run.log": b"first line\n"})

    def grow() -> None:
        with (work / "run.log").open("ab") as file:
            file.write(b"another line\n")

    before_reading(monkeypatch, grow)

    snapshot.take()

    assert (snapshot._copy.top / "run.log").read_bytes() == b"first line\n"


def test_it_is_there_again_as_it_was_sent(snapshot: Snapshot, work: Path) -> None:
    snapshot.take()
    write(work, {"a.py": b"edited since"})
    later = Snapshot(workspace_of(str(work), slot=0), "laptop")

    assert later.reuse()
    assert later.manifest.entries == snapshot.manifest.entries
    later.close()


def test_what_was_never_sent_cannot_be_sent_again(snapshot: Snapshot) -> None:
    assert not snapshot.reuse()


def test_rules_limits_and_what_is_skipped_are_those_of_the_workspace(work: Path) -> None:
    (work / "out").symlink_to("/etc")
    workspace: Workspace = replace(workspace_of(str(work), slot=0), ignore=("*.bin",), limits=Limits(max_bytes=100))
    snapshot = Snapshot(workspace, "laptop")

    snapshot.take()
    assert list(snapshot.manifest.entries) == ["a.py", "bin/run", "d/link"]
    assert snapshot.skipped == ("out: a link to what lies outside",)
    write(work, {"more": b"x" * 100})
    with pytest.raises(WorkspaceTooLarge):
        snapshot.take()
    snapshot.close()


def test_a_place_that_cannot_be_written_is_told(work: Path, state: Path) -> None:
    state.touch()

    with pytest.raises(WorkspaceError, match=r"Not a directory.*set DANAUS_STATE_DIR"):
        Snapshot(workspace_of(str(work), slot=0), "laptop")


def test_it_is_not_the_copy_of_a_daemon_on_the_same_machine(snapshot: Snapshot, work: Path) -> None:
    workspace = workspace_of(str(work), slot=0)

    assert os.path.dirname(snapshot.top) != str(module.workspace_directory(workspace.workspace_id, "laptop"))
