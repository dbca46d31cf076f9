"""What is read to be sent, in which messages, and which hosts get them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danaus.runtime.workspace.contents import MAX_SLICES, Contents, targets
from danaus.runtime.workspace.errors import WorkspaceError
from danaus.runtime.workspace.manifest import digest_of
from danaus.runtime.workspace.receiver import MAX_PACK, _unpack, pack_pieces
from danaus.runtime.workspace.scan import scan

from .trees import Tree, write

if TYPE_CHECKING:
    from pathlib import Path

Packs = list[tuple[tuple[int, ...], list[tuple[bytes, int, bytes]]]]


def packs(top: Path, tree: Tree, needed_by: dict[bytes, list[int]], limit_bytes: int = 1000) -> Packs:
    manifest = scan(str(write(top, tree))).manifest
    contents = Contents(str(top), manifest, {digest_of(content): ranks for content, ranks in needed_by.items()})
    return list(contents.packs(limit_bytes))


def joined(found: Packs) -> dict[bytes, bytes]:
    """Each content as the pieces make it, which have to come in order."""
    contents: dict[bytes, bytes] = {}
    for _, pieces in found:
        for digest, offset, data in pieces:
            assert offset == len(contents.get(digest, b""))
            contents[digest] = contents.get(digest, b"") + data
    return contents


def test_small_files_travel_together_and_large_ones_in_pieces(tmp_path: Path) -> None:
    large = bytes(range(256)) * 10
    tree = {f"{index}.py": b"%d" % index for index in range(20)} | {"large": large, "empty": b"", "link@": b"0.py"}

    found = packs(tmp_path, tree, {content: [0, 1] for content in tree.values()})

    assert joined(found) == {digest_of(content): content for content in tree.values()}
    assert len(found) == 3 + 1
    assert max(sum(len(piece[2]) for piece in pieces) for _, pieces in found) <= 1000
    assert {ranks for ranks, _ in found} == {(0, 1)}


def test_files_with_equal_content_travel_once(tmp_path: Path) -> None:
    [(_, pieces)] = packs(tmp_path, {"a": b"same", "b/c": b"same"}, {b"same": [0]})

    assert pieces == [(digest_of(b"same"), 0, b"same")]


def test_hosts_that_lack_different_files_get_different_messages(tmp_path: Path) -> None:
    found = packs(tmp_path, {"a": b"1", "b": b"2", "c": b"3"}, {b"1": [0, 1], b"2": [1], b"3": [0, 1]})

    assert {ranks: [piece[2] for piece in pieces] for ranks, pieces in found} == {(0, 1): [b"1", b"3"], (1,): [b"2"]}


def test_of_a_file_that_grew_as_much_is_sent_as_the_scan_saw(tmp_path: Path) -> None:
    manifest = scan(str(write(tmp_path, {"log": b"one line\n"}))).manifest
    (tmp_path / "log").write_bytes(b"one line\nand another\n")

    [(_, pieces)] = Contents(str(tmp_path), manifest, {digest_of(b"one line\n"): [0]}).packs(1000)

    assert pieces == [(digest_of(b"one line\n"), 0, b"one line\n")]


@pytest.mark.parametrize("change", ["gone", "shorter"])
def test_of_a_file_that_is_gone_or_shorter_less_is_sent(tmp_path: Path, change: str) -> None:
    manifest = scan(str(write(tmp_path, {"a": b"0123456789"}))).manifest
    if change == "gone":
        (tmp_path / "a").unlink()
    else:
        (tmp_path / "a").write_bytes(b"01")

    [(_, pieces)] = Contents(str(tmp_path), manifest, {digest_of(b"0123456789"): [0]}).packs(1000)

    assert b"".join(piece[2] for piece in pieces) == (b"" if change == "gone" else b"01")


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([0], [(0, 1)]),
        ([3, 4, 5], [(3, 6)]),
        ([5, 0, 1], [(0, 2), (5, 6)]),
        (list(range(64)), [(0, 64)]),
        (list(range(0, 64, 2)), [(0, 64)]),
    ],
)
def test_neighbours_get_one_message_and_scattered_hosts_one_with_all(
    ranks: list[int], expected: list[tuple[int, int]]
) -> None:
    assert [(part.start, part.stop) for part in targets(ranks, 64)] == expected


@given(st.sets(st.integers(0, 31), min_size=1))
def test_whoever_needs_a_content_gets_it_once(ranks: set[int]) -> None:
    slices = targets(sorted(ranks), 32)

    reached = [rank for part in slices for rank in range(part.start, part.stop)]
    assert ranks <= set(reached)
    assert len(reached) == len(set(reached))
    assert len(slices) <= MAX_SLICES


@given(st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 1 << 40), st.binary(max_size=2000))))
def test_packs_arrive_as_they_were_sent(pieces: list[tuple[bytes, int, bytes]]) -> None:
    pack, is_compressed = pack_pieces(pieces)

    assert [tuple(piece) for piece in _unpack(pack, is_compressed=is_compressed)] == pieces


def test_only_what_shrinks_is_compressed() -> None:
    assert pack_pieces([(bytes(16), 0, b"x" * 10_000)])[1]
    assert not pack_pieces([(bytes(16), 0, bytes(range(256)))])[1]


@pytest.mark.parametrize(
    ("pack", "is_compressed"),
    [
        (b"", False),
        (b"garbage", True),
        (b"\x91\x01", False),
        (pack_pieces([(b"short", 0, b"")])[0], False),
        (pack_pieces([(bytes(16), 0, bytes(MAX_PACK))])[0], True),
    ],
)
def test_a_malformed_pack_is_refused(pack: bytes, *, is_compressed: bool) -> None:
    with pytest.raises(WorkspaceError, match="malformed pack"):
        _unpack(pack, is_compressed=is_compressed)
