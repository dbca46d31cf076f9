"""Finding text, reading it in a fixed order, and holding some of it out."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest
import torch

from danaus.actors import ByteTokenizer, find_texts, make_corpus, read_documents

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.torch


def write_files(folder: Path, count: int = 20) -> list[Path]:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.txt").write_text(f"document {number}\n" * 3)
    return sorted(folder.iterdir())


def test_the_standard_library_is_found_without_a_pattern() -> None:
    files = find_texts()

    names = {path.name for path in files}
    assert {"argparse.py", "dataclasses.py", "selectors.py"} <= names
    assert not any(folder in path.parts for path in files for folder in ("site-packages", "test", "__pycache__"))


def test_patterns_go_down_folders_and_count_a_file_once(tmp_path: Path) -> None:
    write_files(tmp_path / "deep" / "er", 3)

    files = find_texts([f"{tmp_path}/**/*.txt", f"{tmp_path}/deep/er/1.txt"])

    assert [path.name for path in files] == ["0.txt", "1.txt", "2.txt"]


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file matches .*/\*\.md"):
        find_texts([f"{tmp_path}/*.md"])


def test_the_order_of_documents_does_not_depend_on_where_they_lie(tmp_path: Path) -> None:
    here = read_documents(write_files(tmp_path / "a"), max_bytes=1 << 20)
    there = read_documents(reversed(write_files(tmp_path / "b" / "c")), max_bytes=1 << 20)

    assert here == there
    assert here != sorted(here)
    assert len(here) == 20


def test_reading_ends_at_the_limit(tmp_path: Path) -> None:
    documents = read_documents(write_files(tmp_path / "a"), max_bytes=100)

    assert sum(len(text.encode()) for text in documents) == 100


def test_bytes_that_are_no_text_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "broken.txt").write_bytes(b"ab\xffcd")

    assert read_documents([tmp_path / "broken.txt"], max_bytes=100) == ["ab\ufffdcd"]


def test_documents_end_with_a_mark_and_the_last_part_is_held_out() -> None:
    corpus = make_corpus(["abc", "defg"], val_fraction=0.25)

    tokens = torch.cat((corpus.train_tokens, corpus.val_tokens))
    assert bytes(tokens.tolist()) == b"abc\0defg\0"
    assert len(corpus.val_tokens) == 2
    assert tokens.dtype == torch.uint8


def test_a_corpus_pickles_with_its_fingerprint_and_no_more_than_its_tokens() -> None:
    corpus = make_corpus(["some text " * 1000])

    data = pickle.dumps(corpus)
    copy = pickle.loads(data)

    assert copy.fingerprint == corpus.fingerprint
    assert len(data) < 12_000


def test_fingerprints_tell_corpora_apart() -> None:
    fingerprints = {
        make_corpus(["abcdefgh"]).fingerprint,
        make_corpus(["abcdefgi"]).fingerprint,
        make_corpus(["abcdefgh"], val_fraction=0.5).fingerprint,
    }

    assert len(fingerprints) == 3


@pytest.mark.parametrize("documents", [[], [""]])
def test_no_text_is_refused(documents: list[str]) -> None:
    with pytest.raises(ValueError, match="no text"):
        make_corpus(documents, ByteTokenizer())


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_held_out_part_of_nothing_or_everything_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"outside of \(0, 1\)"):
        make_corpus(["abc"], val_fraction=fraction)
