"""The text to learn from: read from files, turned into tokens once, cut into a part to train on and one held out."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .tokenizer import ByteTokenizer, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable

_SKIPPED_FOLDERS = frozenset({
    "__pycache__", "dist-packages", "encodings", "idlelib", "pydoc_data", "site-packages", "test", "tests", "turtledemo"
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokens of many documents, each followed by the end mark. Picklable; the tensors travel out of band.

    Attributes:
        tokenizer: Made the tokens, and turns them back into text.
        train_tokens: ``[N]``, to train on; uint8 for bytes, int32 otherwise.
        val_tokens: ``[N]``, held out.
        num_documents: Number of files that the tokens come from.
    """

    tokenizer: Tokenizer
    train_tokens: Tensor
    val_tokens: Tensor
    num_documents: int

    @property
    def fingerprint(self) -> str:
        """Short text that differs where the tokens or their meaning do."""
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        for tokens_N in (self.train_tokens, self.val_tokens):
            digest.update(f"{tokens_N.dtype} {len(tokens_N)};".encode())
            digest.update(tokens_N.numpy().data)
        return digest.hexdigest()[:16]


def find_texts(patterns: Iterable[str] = ()) -> list[Path]:
    """Return the files that match any of ``patterns`` (``**`` goes down), sorted by name.

    Without patterns: the source files of the running Python's standard library, its tests and tables left out.

    Raises:
        FileNotFoundError: Nothing matches.
    """
    patterns = list(patterns)
    if not patterns:
        return _library_sources()
    found = {Path(name) for pattern in patterns for name in glob.glob(os.path.expanduser(pattern), recursive=True)}
    files = sorted(path for path in found if path.is_file())
    if not files:
        raise FileNotFoundError(f"no file matches {' '.join(patterns)}; quote a pattern such as 'notes/**/*.md'")
    return files


def _library_sources() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path for path in root.rglob("*.py") if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )
    if not files:
        raise FileNotFoundError(f"no source file of the standard library under {root}; name other texts by a pattern")
    return files


def read_documents(files: Iterable[Path], *, max_bytes: int) -> list[str]:
    """Return the texts of ``files`` in an order that is random but the same everywhere, up to ``max_bytes`` in all.

    Empty files are left out, the last document is cut short, and bytes that are no UTF-8 come as U+FFFD.
    """
    documents: list[str] = []
    left = max_bytes
    files = list(files)
    for path in _shuffled(files):
        text = path.read_bytes()[:left].decode(errors="replace")
        if text:
            documents.append(text)
            left -= len(text.encode())
        if left <= 0:
            break
    return documents


def _shuffled(files: list[Path]) -> list[Path]:
    if not files:
        return []
    folder = os.path.commonpath([path.absolute().parent for path in files])
    # by the name below the common folder, so that two machines with other prefixes agree
    return sorted(files, key=lambda path: hashlib.sha256(os.path.relpath(path.absolute(), folder).encode()).digest())


def make_corpus(documents: Iterable[str], tokenizer: Tokenizer | None = None, *, val_fraction: float = 0.05) -> Corpus:
    """Turn ``documents`` into tokens; the last ``val_fraction`` of these is held out.

    With many documents that holds out whole ones, but for the one that the cut goes through; with one, its end.

    Raises:
        ValueError: ``val_fraction`` is outside of (0, 1), or there is no text.
    """
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"make_corpus: val_fraction {val_fraction} is outside of (0, 1)")
    tokenizer = tokenizer or ByteTokenizer()
    documents = list(documents)
    if not any(documents):
        raise ValueError("make_corpus: no text in any document")
    tokens_N = _tokens_of(documents, tokenizer)
    num_val = max(1, round(len(tokens_N) * val_fraction))
    # clones: a view would be pickled with all of the memory that it is a view of
    return Corpus(tokenizer, tokens_N[:-num_val].clone(), tokens_N[-num_val:].clone(), len(documents))


def _tokens_of(documents: list[str], tokenizer: Tokenizer) -> Tensor:
    if isinstance(tokenizer, ByteTokenizer):
        joined = bytearray()
        for text in documents:
            joined += text.replace("\0", "").encode() + b"\0"
        return torch.frombuffer(joined, dtype=torch.uint8)
    parts = [torch.tensor([*tokenizer.encode(text), tokenizer.end_id], dtype=torch.int32) for text in documents]
    return torch.cat(parts)
