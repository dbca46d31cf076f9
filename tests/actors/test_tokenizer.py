"""Text to ids and back."""

from __future__ import annotations

import builtins
import pickle
from typing import Any

import pytest

from danaus.actors import BpeTokenizer, ByteTokenizer, make_corpus

TEXT = "def äpfel(x: int) -> str:\n\treturn f'{x} 🍎'\n" * 20
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    pytest.importorskip("tokenizers")
    return BpeTokenizer.train([TEXT], vocab_size=300)


def test_bytes_come_back_as_they_were() -> None:
    tokenizer = ByteTokenizer()

    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode("ä") == [0xC3, 0xA4]


def test_half_a_character_is_shown_as_such() -> None:
    assert ByteTokenizer().decode([0x61, 0xC3, 0]) == "a\ufffd"


def test_byte_pairs_come_back_as_they_were_and_are_fewer_than_bytes(bpe: BpeTokenizer) -> None:
    ids = bpe.encode(TEXT)

    assert bpe.decode(ids) == TEXT
    assert len(ids) < len(TEXT.encode()) / 2
    assert bpe.vocab_size <= 300


def test_byte_pairs_know_text_that_they_were_not_trained_on(bpe: BpeTokenizer) -> None:
    assert bpe.decode(bpe.encode("ж ☃ \x01 zebra")) == "ж ☃ \x01 zebra"


def test_an_end_mark_in_the_text_is_text(bpe: BpeTokenizer) -> None:
    ids = bpe.encode("a<|end|>b")

    assert bpe.end_id not in ids
    assert bpe.decode(ids) == "a<|end|>b"
    assert bpe.decode([*ids, bpe.end_id]) == "a<|end|>b"


def test_a_pickled_tokenizer_is_the_same(bpe: BpeTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(bpe))

    assert copy.fingerprint == bpe.fingerprint
    assert copy.encode(TEXT) == bpe.encode(TEXT)


def test_training_again_gives_the_same_tokenizer(bpe: BpeTokenizer) -> None:
    assert BpeTokenizer.train([TEXT], vocab_size=300).fingerprint == bpe.fingerprint


def test_a_corpus_of_byte_pairs_marks_the_end_of_each_document(bpe: BpeTokenizer) -> None:
    corpus = make_corpus(["def x", "return y"], bpe, val_fraction=0.1)

    ids = [*corpus.train_tokens.tolist(), *corpus.val_tokens.tolist()]
    assert ids == [*bpe.encode("def x"), bpe.end_id, *bpe.encode("return y"), bpe.end_id]


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="no room for 256 bytes"):
        BpeTokenizer.train([TEXT], vocab_size=256)


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("tokenizers"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"danaus\[train\]"):
        BpeTokenizer.train([TEXT], vocab_size=300)
