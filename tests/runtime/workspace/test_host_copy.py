"""A host's copy becomes what the controller has, whatever was there, and nothing is written anywhere else."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings

from danaus.runtime.workspace import host_copy as module
from danaus.runtime.workspace.errors import WorkspaceError
from danaus.runtime.workspace.host_copy import HostCopy, Outcome
from danaus.runtime.workspace.manifest import Entry, Kind, Manifest, digest_of
from danaus.runtime.workspace.scan import scan

from .trees import Tree, plain, read, trees, write

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = b"not yours"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Where a host keeps what belongs to the workspace."""
    return tmp_path / "host/ws"


@pytest.fixture
def copy(base: Path) -> Iterator[HostCopy]:
    """One controller's access to it."""
    made = HostCopy(base, lock_s=0.1)
    yield made
    made.close()


def manifest_of(tree: Tree) -> Manifest:
    """What a scan of ``tree`` finds; links are taken as they are."""
    kinds = {"*": Kind.EXECUTABLE, "@": Kind.LINK}
    return Manifest(
        {
            path.rstrip("*@"): Entry(digest_of(content), kinds.get(path[-1], Kind.FILE), len(content))
            for path, content in tree.items()
        }
    )


def bring(copy: HostCopy, tree: Tree) -> tuple[list[bytes], Outcome]:
    """Sync ``tree``; return what had to be sent, and what became of it."""
    manifest = manifest_of(tree)
    contents = {digest_of(content): content for content in tree.values()}
    missing = copy.missing(manifest)
    for digest in missing:
        copy.put(digest, 0, contents[digest])
    return [contents[digest] for digest in missing], copy.commit(manifest)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=trees(), second=trees())
def test_a_copy_becomes_each_tree_in_turn_and_a_third_sync_sends_nothing(first: Tree, second: Tree) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = HostCopy(Path(folder))
        bring(copy, first)

        sent, outcome = bring(copy, second)
        again = bring(copy, second)

        assert read(copy.top) == second
        assert copy.root() == manifest_of(second).root
        assert set(sent).isdisjoint(content for path, content in first.items() if path[-1] != "@")
        assert outcome.missing == ()
        assert again == ([], Outcome())
        copy.close()


def test_what_a_scan_finds_is_what_a_copy_becomes(tmp_path: Path, copy: HostCopy) -> None:
    tree = {"a.py": b"1", "bin/run*": b"#!", "d/link@": b"../a.py", "empty": b""}
    write(tmp_path / "laptop", tree)

    assert scan(str(tmp_path / "laptop")).manifest.root == manifest_of(tree).root
    assert bring(copy, tree)[1] == Outcome(written=4)
    assert read(copy.top) == tree


def test_only_what_changed_has_to_be_sent(copy: HostCopy) -> None:
    tree = {f"m{index}.py": b"%d" % index for index in range(50)}
    bring(copy, tree)

    sent, outcome = bring(copy, tree | {"m7.py": b"edited", "m8.py": b"edited"})

    assert (sent, outcome) == ([b"edited"], Outcome(written=2))


def test_a_file_that_moved_is_not_sent_again(copy: HostCopy) -> None:
    bring(copy, {"old/model.py": b"x" * 100, "train.py": b"t"})

    sent, outcome = bring(copy, {"new/model.py": b"x" * 100, "train.py": b"t"})

    assert (sent, outcome) == ([], Outcome(written=1, deleted=1))
    assert read(copy.top) == {"new/model.py": b"x" * 100, "train.py": b"t"}
    assert not (copy.top / "old").exists()


def test_a_change_of_mode_alone_sends_nothing(copy: HostCopy) -> None:
    bring(copy, {"run": b"#!"})

    assert bring(copy, {"run*": b"#!"}) == ([], Outcome(written=1))
    assert os.access(copy.top / "run", os.X_OK)


def test_what_programs_wrote_stays(copy: HostCopy) -> None:
    bring(copy, {"a/train.py": b"1", "a/b.py": b"2"})
    write(copy.top, {"a/out/model.pt": b"weights", "log.txt": b"l"})

    _, outcome = bring(copy, {"a/train.py": b"3"})

    assert outcome == Outcome(written=1, deleted=1)
    assert read(copy.top) == {"a/train.py": b"3", "a/out/model.pt": b"weights", "log.txt": b"l"}


def test_what_programs_changed_is_mended_although_nothing_changed_here(copy: HostCopy) -> None:
    tree = {"a.py": b"right", "b.py": b"right too", "c@": b"a.py"}
    bring(copy, tree)
    (copy.top / "a.py").write_bytes(b"wrong")
    (copy.top / "b.py").unlink()
    (copy.top / "c").unlink()

    assert copy.root() != manifest_of(tree).root
    bring(copy, tree)

    assert read(copy.top) == tree


def test_files_are_private_and_new_each_time(copy: HostCopy, base: Path) -> None:
    bring(copy, {"a.py": b"1", "run*": b"#!"})
    inode = os.stat(copy.top / "a.py").st_ino
    with (copy.top / "a.py").open("rb") as opened:
        bring(copy, {"a.py": b"2", "run*": b"#!"})

        # Who reads it goes on with what it was: files are replaced, never written to.
        assert opened.read() == b"1"
    assert os.stat(copy.top / "a.py").st_ino != inode
    modes = [stat.S_IMODE(os.stat(path).st_mode) for path in (base, copy.top, copy.top / "a.py", copy.top / "run")]
    assert modes == [0o700, 0o700, 0o600, 0o700]


# what is in the way:


def test_directories_become_files_and_files_directories(copy: HostCopy) -> None:
    bring(copy, {"a": b"file", "b/c/d.py": b"x", "e@": b"a"})
    (copy.top / "b/c/__pycache__").mkdir()
    (copy.top / "b/c/__pycache__/d.cpython-311.pyc").touch()

    bring(copy, {"a/x.py": b"1", "b": b"2", "e/y.py": b"3"})

    assert read(copy.top) == {"a/x.py": b"1", "b": b"2", "e/y.py": b"3"}


def test_a_directory_of_programs_in_the_way_of_a_file_is_told_and_kept(copy: HostCopy) -> None:
    write(copy.top, {"out/result": b"precious"})

    with pytest.raises(WorkspaceError, match=r"out is a file in the workspace, but a directory here.*move them away"):
        bring(copy, {"out": b"file"})

    assert (copy.top / "out/result").read_bytes() == b"precious"


@pytest.mark.parametrize("depth", ["", "/deeper"])
def test_a_link_of_programs_in_the_way_of_a_directory_is_not_followed(
    copy: HostCopy, tmp_path: Path, depth: str
) -> None:
    outside = write(tmp_path / "outside", {"a.py": SECRET, "deeper/a.py": SECRET})
    (copy.top / "lib").symlink_to(outside)

    with pytest.raises(WorkspaceError, match="lib is a directory in the workspace, but here it is something"):
        bring(copy, {f"lib{depth}/a.py": b"overwritten"})

    assert read(outside) == {"a.py": SECRET, "deeper/a.py": SECRET}


def test_a_file_that_programs_made_a_link_is_replaced_not_written_through(copy: HostCopy, tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", {"a.py": SECRET}) / "a.py"
    bring(copy, {"a.py": b"1"})
    (copy.top / "a.py").unlink()
    (copy.top / "a.py").symlink_to(outside)

    bring(copy, {"a.py": b"2"})

    assert (outside.read_bytes(), read(copy.top)) == (SECRET, {"a.py": b"2"})


def test_nothing_is_removed_through_a_link(copy: HostCopy, tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", {"a.py": SECRET})
    bring(copy, {"lib/a.py": b"1", "b": b"2"})
    shutil.rmtree(copy.top / "lib")
    (copy.top / "lib").symlink_to(outside)

    bring(copy, {"b": b"2"})

    assert read(outside) == {"a.py": SECRET}


@pytest.mark.parametrize("target", [b"/etc", b"..", b"x/../../y"])
def test_a_link_that_leads_out_is_refused_by_the_host_too(copy: HostCopy, target: bytes) -> None:
    with pytest.raises(WorkspaceError, match="leads out"):
        bring(copy, {"out@": target})

    assert read(copy.top) == {}


# compiled code:


def imported_value(top: Path) -> str:
    """What a fresh Python finds in module ``m``; it compiles it, or takes what was compiled before."""
    code = f"import sys; sys.path.insert(0, {str(top)!r}); import m; print(m.VALUE)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=15, check=True, env=environment
    )
    return done.stdout.strip()


def test_an_edit_of_the_same_size_within_a_second_is_not_hidden_by_compiled_code(copy: HostCopy) -> None:
    found = []
    for value in (b"1", b"2", b"3"):
        bring(copy, {"m.py": b"VALUE = " + value})
        found.append(imported_value(copy.top))

    assert found == ["1", "2", "3"]
    assert len(list((copy.top / "__pycache__").iterdir())) == 1


def test_code_that_a_slow_process_compiled_from_the_old_file_is_not_taken_for_the_new(copy: HostCopy) -> None:
    bring(copy, {"m.py": b"VALUE = 1"})
    imported_value(copy.top)
    [compiled] = (copy.top / "__pycache__").iterdir()
    old = compiled.read_bytes()

    bring(copy, {"m.py": b"VALUE = 2"})
    compiled.write_bytes(old)

    assert imported_value(copy.top) == "2"


def test_a_module_that_comes_back_is_not_what_was_compiled_before(copy: HostCopy) -> None:
    bring(copy, {"m.py": b"VALUE = 1", "a": b""})
    imported_value(copy.top)
    bring(copy, {"a": b""})

    bring(copy, {"m.py": b"VALUE = 2", "a": b""})

    assert imported_value(copy.top) == "2"


# contents that arrive wrongly:


def test_nothing_is_put_in_place_before_all_is_there(copy: HostCopy) -> None:
    bring(copy, {"a.py": b"old"})
    manifest = manifest_of({"a.py": b"new", "b.py": b"other"})
    copy.missing(manifest)
    copy.put(digest_of(b"new"), 0, b"new")

    assert copy.commit(manifest) == Outcome(missing=(digest_of(b"other"),))
    assert read(copy.top) == {"a.py": b"old"}


def test_a_content_that_is_not_what_its_hash_says_is_missing(copy: HostCopy) -> None:
    manifest = manifest_of({"a.py": b"good"})
    copy.missing(manifest)

    copy.put(digest_of(b"good"), 0, b"evil")

    assert copy.commit(manifest).missing == (digest_of(b"good"),)


def test_a_content_arrives_in_pieces_and_may_begin_again(copy: HostCopy) -> None:
    content = bytes(range(256)) * 10
    manifest = manifest_of({"a.bin": content})
    copy.missing(manifest)
    digest = digest_of(content)

    copy.put(digest, 0, content[:1000])
    copy.put(digest, 0, content[:500])
    copy.put(digest, 500, content[500:])

    assert copy.commit(manifest) == Outcome(written=1)
    assert read(copy.top) == {"a.bin": content}


@pytest.mark.parametrize(("offset", "data"), [(5, b"x"), (0, b"x" * 11), (2, b"x" * 9)])
def test_pieces_out_of_order_or_beyond_the_size_are_refused(copy: HostCopy, offset: int, data: bytes) -> None:
    content = b"0123456789"
    copy.missing(manifest_of({"a": content}))
    copy.put(digest_of(content), 0, content[:2])

    with pytest.raises(WorkspaceError, match="piece at"):
        copy.put(digest_of(content), offset, data)


def test_contents_that_nobody_asked_for_are_dropped(copy: HostCopy, base: Path) -> None:
    copy.missing(manifest_of({"a": b"1"}))

    copy.put(digest_of(b"2"), 0, b"2")
    copy.put(b"../../../../../x", 0, b"2")

    assert [path.name for path in base.rglob("*") if path.is_file()] == []


# several controllers, and ends in between:


def test_two_controllers_at_once_each_leave_a_whole_tree(base: Path) -> None:
    one, two = HostCopy(base), HostCopy(base)
    tree_1, tree_2 = {"a.py": b"1", "b.py": b"1"}, {"a.py": b"2", "c.py": b"2"}
    manifests = [manifest_of(tree_1), manifest_of(tree_2)]
    for copy, manifest, content in zip((one, two), manifests, (b"1", b"2"), strict=True):
        copy.missing(manifest)
        copy.put(digest_of(content), 0, content)

    one.commit(manifests[0])
    two.commit(manifests[1])

    assert read(one.top) == tree_2
    assert one.root() == two.root() == manifests[1].root
    one.close()
    two.close()


def test_a_content_that_another_controller_removed_meanwhile_is_told(base: Path) -> None:
    one, two = HostCopy(base), HostCopy(base)
    bring(one, {"a.py": b"1"})
    manifest = manifest_of({"moved.py": b"1"})
    assert one.missing(manifest) == []
    bring(two, {"b.py": b"2"})

    assert one.commit(manifest) == Outcome(missing=(digest_of(b"1"),))
    assert bring(one, {"moved.py": b"1"}) == ([b"1"], Outcome(written=1, deleted=1))
    one.close()
    two.close()


def test_a_controller_waits_for_another_that_writes_and_says_so(copy: HostCopy, base: Path) -> None:
    with (base / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        with pytest.raises(WorkspaceError, match=r"another controller has been writing.*0\.1 s"):
            bring(copy, {"a.py": b"1"})

    assert bring(copy, {"a.py": b"1"})[1] == Outcome(written=1)


@pytest.mark.parametrize("at", ["place", "remove"])
def test_a_sync_that_is_killed_is_made_good_by_the_next(
    copy: HostCopy, base: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    bring(copy, {"a.py": b"1", "b.py": b"1", "gone.py": b"1"})
    root_before = (base / "root").read_text()
    calls = []

    def killed(*arguments: object) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(real(*arguments))

    real = getattr(module, at)
    with monkeypatch.context() as patch:
        patch.setattr(module, at, killed)
        try:
            bring(copy, {"new.py": b"2", "a.py": b"2", "b.py": b"3"})
        except KeyboardInterrupt:
            assert at == "place"
    if at == "place":
        assert (base / "root").read_text() != root_before

    bring(copy, {"a.py": b"4"})

    assert read(copy.top) == {"a.py": b"4"}


def test_a_record_that_is_broken_costs_no_file_of_programs(copy: HostCopy, base: Path) -> None:
    bring(copy, {"a.py": b"1"})
    write(copy.top, {"out": b"precious"})
    (base / "record").write_bytes(b"garbage")

    bring(copy, {"a.py": b"2"})

    assert read(copy.top) == {"a.py": b"2", "out": b"precious"}


def test_what_arrived_for_controllers_that_were_killed_is_removed_after_a_day(base: Path) -> None:
    killed, other = HostCopy(base), HostCopy(base)
    [old] = [path for path in base.glob("incoming-*") if str(path) == killed._incoming]
    long_ago_s = time.time() - module.STALE_S - 1
    os.utime(old, (long_ago_s, long_ago_s))

    HostCopy(base).close()

    assert [str(path) for path in base.glob("incoming-*")] == [other._incoming]
    other.close()
    assert list(base.glob("incoming-*")) == []


def test_the_root_file_names_what_the_copy_holds(copy: HostCopy, base: Path) -> None:
    bring(copy, {"a.py": b"1"})
    first = (base / "root").read_text()
    bring(copy, {"a.py": b"2"})

    assert first == manifest_of({"a.py": b"1"}).root.hex()
    assert (base / "root").read_text() == manifest_of({"a.py": b"2"}).root.hex()


def test_trees_of_the_tests_hold_no_path_twice() -> None:
    assert plain({"a*": b"", "b@": b"", "c": b""}) == {"a", "b", "c"}
