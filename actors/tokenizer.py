"""Text to token ids and back: bytes as they are, or byte pairs learned from the text.

A tokenizer is small and picklable, travels with the corpus, and is equal to another where its fingerprint is.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

END_MARK = "<|end|>"


class Tokenizer(Protocol):
    """What the trainer and the corpus need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def end_id(self) -> int:
        """Id of the mark between documents."""
        ...

    @property
    def fingerprint(self) -> str:
        """Short text that differs where the ids of any text could differ."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without an end mark."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; end marks are left out, and bytes that are no UTF-8 come as U+FFFD."""
        ...


class ByteTokenizer:
    """One id per byte of UTF-8; byte 0, which text does not hold, marks the end of a document."""

    vocab_size = 256
    end_id = 0
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        """Return the bytes of ``text``."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of these bytes."""
        return bytes(token for token in ids if token != self.end_id).decode(errors="replace")


class BpeTokenizer:
    """Byte-level byte-pair encoding by the ``tokenizers`` package.

    Args:
        definition: JSON as :meth:`train` makes it, or as the package saves it. It has to know ``<|end|>``.

    Raises:
        ImportError: ``tokenizers`` is not installed.
        ValueError: The definition has no end mark.
    """

    def __init__(self, definition: str) -> None:
        self.definition = definition
        if self._inner.token_to_id(END_MARK) is None:
            raise ValueError(
                f"BpeTokenizer: the definition has no token {END_MARK!r} to mark the end of a document; add it"
            )

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int = 4096) -> BpeTokenizer:
        """Learn ``vocab_size`` tokens, the 256 bytes and the end mark among them, from ``texts``.

        Raises:
            ImportError: ``tokenizers`` is not installed.
            ValueError: ``vocab_size`` has no room for the bytes and the end mark.
        """
        if vocab_size < 257:
            raise ValueError(f"BpeTokenizer.train: vocab_size {vocab_size} has no room for 256 bytes and the end mark")
        package = _tokenizers()
        inner = package.Tokenizer(package.models.BPE())
        inner.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_MARK],
            initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner.to_str())

    @cached_property
    def _inner(self) -> Any:
        inner = _tokenizers().Tokenizer.from_str(self.definition)
        # an end mark in the text is text
        inner.encode_special_tokens = True
        return inner

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self._inner.get_vocab_size())

    @property
    def end_id(self) -> int:
        """Id of the mark between documents."""
        return int(self._inner.token_to_id(END_MARK))

    @property
    def fingerprint(self) -> str:
        """Hash of the definition."""
        return "bpe-" + hashlib.sha256(self.definition.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``."""
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def __reduce__(self) -> tuple[type[BpeTokenizer], tuple[str]]:
        return BpeTokenizer, (self.definition,)


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise ImportError("BpeTokenizer needs the package `tokenizers`: pip install 'danaus[train]'") from error
    return tokenizers
