"""What a tree holds, as it travels: every path of it is checked where it arrives."""

from __future__ import annotations

import posixpath
import zlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danaus.runtime.workspace.errors import WorkspaceError
from danaus.runtime.workspace.manifest import Entry, Kind, Manifest, check_target, digest_of, unpack_manifest


def entry(content: bytes = b"x", kind: Kind = Kind.FILE) -> Entry:
    return Entry(digest_of(content), kind, len(content))


def packed(path: object, digest: object = bytes(16), kind: object = 0, size: object = 1) -> bytes:
    return zlib.compress(bytes(msgpack.packb([[path, digest, kind, size]], unicode_errors="surrogateescape") or b""))


NAMES = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=20)


@given(st.dictionaries(NAMES.filter(lambda name: name not in {".", ".."}), st.binary(max_size=20)))
def test_a_manifest_arrives_as_it_was_sent(contents: dict[str, bytes]) -> None:
    manifest = Manifest({path: entry(content) for path, content in contents.items()})

    arrived = unpack_manifest(manifest.pack())

    assert (arrived.entries, arrived.root) == (manifest.entries, manifest.root)


def test_names_that_are_no_text_arrive_too() -> None:
    manifest = Manifest({"caf\udce9.py": entry()})

    assert unpack_manifest(manifest.pack()).entries == manifest.entries


def test_the_root_tells_paths_kinds_and_contents_apart_and_nothing_else() -> None:
    base = Manifest({"a": entry(), "b": entry(b"y")})

    assert base.root == Manifest({"b": entry(b"y"), "a": entry()}).root
    others = [
        Manifest({"a": entry()}),
        Manifest({"a": entry(), "c": entry(b"y")}),
        Manifest({"a": entry(), "b": entry(b"z")}),
        Manifest({"a": entry(), "b": entry(b"y", Kind.EXECUTABLE)}),
    ]
    assert len({base.root, *(each.root for each in others)}) == 5


def test_what_changed_and_what_is_gone_is_told() -> None:
    old = Manifest({"same": entry(), "edited": entry(b"1"), "mode": entry(), "gone": entry()})
    new = Manifest({"same": entry(), "edited": entry(b"2"), "mode": entry(kind=Kind.EXECUTABLE), "new": entry()})

    assert new.changed_since(old.entries) == ["edited", "mode", "new"]
    assert new.lacks(old.entries) == ["gone"]


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../a",
        "a/../../b",
        "a/..",
        "./a",
        "a//b",
        "",
        "a/",
        "nul\0",
        "a" * 256,
        "/".join(["a" * 200] * 20),
    ],
)
def test_a_path_that_leaves_the_directory_is_refused(path: str) -> None:
    with pytest.raises(WorkspaceError, match="refused the path"):
        unpack_manifest(packed(path))


def test_a_file_that_would_have_to_be_a_directory_is_refused() -> None:
    manifest = Manifest({"a": entry(kind=Kind.LINK), "a/b": entry()})

    with pytest.raises(WorkspaceError, match="'a' is no directory"):
        unpack_manifest(manifest.pack())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        zlib.compress(b"garbage"),
        zlib.compress(b"\x01"),
        packed(b"bytes"),
        packed(1),
        packed("a", digest=b"short"),
        packed("a", kind=3),
        packed("a", size=-1),
        packed("a", size=1 << 60),
        packed("a", size="1"),
    ],
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(WorkspaceError, match="malformed"):
        unpack_manifest(data)


@pytest.mark.parametrize(
    ("path", "target"),
    [("a", "b"), ("a", "d/e"), ("d/a", "../b"), ("d/e/a", "../../x/y"), ("d/a", ".."), ("a", "...")],
)
def test_links_inside_the_directory_are_taken(path: str, target: str) -> None:
    check_target(path, target)


@pytest.mark.parametrize(
    ("path", "target"),
    [("a", "/etc"), ("a", ".."), ("a", "../b"), ("d/a", "../../b"), ("d/a", "x/../../b"), ("a", ""), ("a", "d/..")],
)
def test_links_that_lead_out_are_refused(path: str, target: str) -> None:
    with pytest.raises(WorkspaceError, match="leads out"):
        check_target(path, target)


@given(
    path=st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=3).map("/".join),
    target=st.lists(st.sampled_from(["a", "..", "c", "."]), min_size=1, max_size=5).map("/".join),
)
def test_no_link_that_is_taken_leads_out(path: str, target: str) -> None:
    try:
        check_target(path, target)
    except WorkspaceError:
        return

    reached = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    assert not reached.startswith("..")
