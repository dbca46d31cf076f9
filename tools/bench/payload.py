"""Arrays and tensors that the benchmark sends, and their sums. Imports numpy and torch at first use."""

from __future__ import annotations

import importlib
from typing import Any, Final

KINDS: Final = ("numpy", "torch")


def make(kind: str, size_bytes: int) -> Any:
    """Return a warm array or tensor of bytes.

    Raises:
        ValueError: ``kind`` is none of ``KINDS``.
    """
    if kind not in KINDS:
        raise ValueError(f"payload kind {kind!r}: expected one of {', '.join(KINDS)}")
    library = importlib.import_module(kind)
    return library.ones(size_bytes, dtype=library.uint8)


def total(payload: Any) -> int:
    """Return the sum of the payload, read as 64-bit words: every byte is read once, at the speed of memory."""
    library = importlib.import_module(type(payload).__module__)
    if library.__name__ == "torch" and library.get_num_threads() > 1:
        # A second thread gains nothing here, and where a core is taken the first waits a time slice (4 ms) for it.
        library.set_num_threads(1)
    return int(payload.view(library.int64).sum())
