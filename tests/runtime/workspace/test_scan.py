"""What is read of a working directory, and what is refused."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

import pytest

from danaus.runtime.workspace import scan as module
from danaus.runtime.workspace.errors import WorkspaceError, WorkspaceTooLarge
from danaus.runtime.workspace.manifest import Kind, digest_of
from danaus.runtime.workspace.scan import Cache, Limits, load_cache, scan

from .trees import write

if TYPE_CHECKING:
    from pathlib import Path


def paths(top: Path, **options: object) -> list[str]:
    return list(scan(str(top), **options).manifest.entries)  # type: ignore[arg-type]


def make_old(top: Path) -> None:
    """Have every file look as if nothing had touched it for long; times of status changes cannot be set."""
    for folder, _, files in os.walk(top):
        for name in files:
            os.utime(os.path.join(folder, name), (1e9, 1e9))


def test_a_scan_says_what_each_path_holds(tmp_path: Path) -> None:
    write(tmp_path, {"train.py": b"code", "bin/run*": b"#!", "link@": b"train.py", "empty": b""})

    entries = scan(str(tmp_path)).manifest.entries

    assert list(entries) == ["bin/run", "empty", "link", "train.py"]
    assert entries["train.py"].digest == digest_of(b"code")
    assert (entries["bin/run"].kind, entries["link"].kind, entries["empty"].size) == (Kind.EXECUTABLE, Kind.LINK, 0)


def test_version_control_caches_and_environments_stay_here(tmp_path: Path) -> None:
    ignored = [
        ".git/config",
        "__pycache__/a.pyc",
        "x/__pycache__/b.pyc",
        ".venv/bin/python",
        "node_modules/m/i.js",
        "c.pyc",
    ]
    write(tmp_path, dict.fromkeys([*ignored, "a.py"], b"x"))

    assert paths(tmp_path) == ["a.py"]


def test_an_ignore_file_of_ours_is_read_in_place_of_gits(tmp_path: Path) -> None:
    write(tmp_path, {".gitignore": b"*.bin\n", "a.bin": b"", "a.log": b"", "x/.danausignore": b"*.py\n", "x/b.py": b""})
    assert paths(tmp_path) == [".gitignore", "a.log", "x/.danausignore", "x/b.py"]

    write(tmp_path, {".danausignore": b"*.log\n"})
    assert paths(tmp_path) == [".danausignore", ".gitignore", "a.bin", "x/.danausignore"]


@pytest.mark.parametrize(
    ("name", "lines", "sent"),
    [
        (".gitignore", b"*\n!*/\n!*.py\n", ["a.py"]),
        (".gitignore", b"!*\n", [".gitignore", "a.py"]),
        (".danausignore", b"!.venv/\n", [".danausignore", ".venv/b.py", "a.py"]),
        (".danausignore", b"!.git\n", [".danausignore", "a.py"]),
    ],
)
def test_only_a_file_of_ours_brings_environments_back_and_nothing_brings_version_control_back(
    tmp_path: Path, name: str, lines: bytes, sent: list[str]
) -> None:
    write(tmp_path, {name: lines, "a.py": b"", ".venv/b.py": b"", ".git/c.py": b""})

    assert paths(tmp_path) == sent


def test_rules_of_the_call_come_last(tmp_path: Path) -> None:
    write(tmp_path, {".gitignore": b"*.bin\n", "a.bin": b"", "b.py": b"", "__pycache__/c.pyc": b""})

    assert paths(tmp_path, ignore=["!*.bin", "*.py"]) == [".gitignore", "a.bin"]


def test_an_ignore_file_may_start_with_a_mark_and_hold_what_is_no_text(tmp_path: Path) -> None:
    write(tmp_path, {".gitignore": b"\xef\xbb\xbf*.log\r\ncaf\xe9\n", "a.log": b"", "b": b""})
    (tmp_path / "caf\udce9").touch()

    assert paths(tmp_path) == [".gitignore", "b"]


def test_links_that_lead_out_and_what_is_no_file_are_left_out_and_told(tmp_path: Path) -> None:
    top = write(tmp_path / "work", {"a.py": b"", "d/in@": b"../a.py", "d/out@": b"../../secret", "etc@": b"/etc"})
    (tmp_path / "secret").write_bytes(b"s")
    os.mkfifo(top / "pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(top / "sock"))

        found = scan(str(top))

    assert list(found.manifest.entries) == ["a.py", "d/in"]
    assert found.skipped == (
        "d/out: a link to what lies outside",
        "etc: a link to what lies outside",
        "pipe: neither a file nor a link",
        "sock: neither a file nor a link",
    )


def test_a_link_by_a_whole_path_or_a_chain_travels_as_a_short_one(tmp_path: Path) -> None:
    top = write(tmp_path / "work", {"lib/a.py": b"", "x/y@": str(tmp_path / "work/lib").encode(), "z@": b"x/y/a.py"})

    entries = scan(str(top)).manifest.entries

    assert entries["x/y"].digest == digest_of(b"../lib")
    assert entries["z"].digest == digest_of(b"lib/a.py")


def test_links_that_go_round_in_circles_are_no_trouble(tmp_path: Path) -> None:
    write(tmp_path, {"a@": b"b", "b@": b"a", "d/self@": b"..", "f": b""})

    assert "f" in paths(tmp_path)


# what is read again:


def test_an_unchanged_tree_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a.py": b"1", "b/c.py": b"2"})
    monkeypatch.setattr(module, "SETTLED_S", 0.0)
    cache = Cache()
    first = scan(str(tmp_path), cache=cache)

    again = scan(str(tmp_path), cache=cache)

    assert (first.num_read, again.num_read) == (2, 0)
    assert again.manifest.entries == first.manifest.entries


@pytest.mark.parametrize("restore_times", [False, True])
def test_an_edit_of_the_same_size_is_seen_even_with_the_old_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, restore_times: bool
) -> None:
    write(tmp_path, {"a.py": b"return 1", "b.py": b""})
    make_old(tmp_path)
    monkeypatch.setattr(module, "SETTLED_S", 0.0)
    cache = Cache()
    scan(str(tmp_path), cache=cache)
    before_ns = os.stat(tmp_path / "a.py").st_ctime_ns
    deadline_s = time.monotonic() + 5
    while os.stat(tmp_path / "a.py").st_ctime_ns == before_ns and time.monotonic() < deadline_s:
        (tmp_path / "a.py").write_bytes(b"return 2")
    if restore_times:
        os.utime(tmp_path / "a.py", (1e9, 1e9))

    again = scan(str(tmp_path), cache=cache)

    assert (again.num_read, again.manifest.entries["a.py"].digest) == (1, digest_of(b"return 2"))


def test_a_file_that_changed_just_now_is_read_again(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": b"1"})
    cache = Cache()
    scan(str(tmp_path), cache=cache)

    assert cache.known == {}
    assert scan(str(tmp_path), cache=cache).num_read == 1


def test_the_cache_is_kept_from_one_script_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = write(tmp_path / "work", {"a.py": b"1", "caf\udce9": b"2"})
    monkeypatch.setattr(module, "SETTLED_S", 0.0)
    cache = Cache()
    scan(str(top), cache=cache)

    cache.save(tmp_path / "state/cache")

    assert load_cache(tmp_path / "state/cache").known == cache.known
    assert scan(str(top), cache=load_cache(tmp_path / "state/cache")).num_read == 0


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\x01", b"\x91\x01"])
def test_a_cache_that_is_missing_or_broken_is_empty(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "cache").write_bytes(content)

    assert load_cache(tmp_path / "cache").known == {}


def test_files_that_are_gone_leave_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a.py": b"1", "b.py": b"2"})
    monkeypatch.setattr(module, "SETTLED_S", 0.0)
    cache = Cache()
    scan(str(tmp_path), cache=cache)
    (tmp_path / "a.py").unlink()

    scan(str(tmp_path), cache=cache)

    assert list(cache.known) == ["b.py"]


# limits:


def test_too_many_bytes_are_refused_with_the_largest_files_named(tmp_path: Path) -> None:
    write(tmp_path, {"model.pt": b"x" * 5000, "a/data.bin": b"x" * 3000, "train.py": b"x"})

    with pytest.raises(WorkspaceTooLarge) as caught:
        scan(str(tmp_path), limits=Limits(max_bytes=4096))

    lines = str(caught.value).splitlines()
    assert "holds 7.8 KiB, and the limit is 4.0 KiB" in lines[0]
    assert [line.split() for line in lines[1:3]] == [["4.9", "KiB", "model.pt"], ["2.9", "KiB", "a/data.bin"]]
    assert ".danausignore" in lines[-1]
    assert isinstance(caught.value, ValueError)


def test_too_many_files_are_refused_with_the_fullest_folders_named(tmp_path: Path) -> None:
    write(tmp_path, {f"cache/{index}": b"" for index in range(20)} | {"train.py": b""})

    with pytest.raises(WorkspaceTooLarge, match=r"21 files, and the limit is 10 files(.|\n)*20 files  cache/"):
        scan(str(tmp_path), limits=Limits(max_files=10))


def test_what_is_ignored_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, {"model.pt": b"x" * 5000, "train.py": b"x"})

    assert paths(tmp_path, ignore=["*.pt"], limits=Limits(max_bytes=100)) == ["train.py"]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a.py": b"", "secret": b""})
    real = open

    def refuse(path: str, *args: object, **kwargs: object) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr("builtins.open", refuse)

    with pytest.raises(WorkspaceError, match=r"secret cannot be read .*Permission denied.*\.danausignore"):
        scan(str(tmp_path))
