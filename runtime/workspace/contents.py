"""Reads the contents that hosts lack, and packs them into messages; says which hosts get each."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from .manifest import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .manifest import Manifest

MAX_SLICES: Final = 4
"""Where the hosts that need a content lie in more runs than this, all hosts get it: it is one message then."""

Piece = tuple[bytes, int, bytes]
"""Hash of a content, offset in it, data."""


class Contents:
    """What is to be sent of a directory.

    Args:
        top: The directory.
        manifest: What it holds.
        needed_by: Ranks that need a content, by its hash.
    """

    def __init__(self, top: str, manifest: Manifest, needed_by: Mapping[bytes, Sequence[int]]) -> None:
        self._top, self._manifest = top, manifest
        self._groups: dict[tuple[int, ...], list[bytes]] = {}
        for digest, ranks in needed_by.items():
            self._groups.setdefault(tuple(ranks), []).append(digest)
        self._paths = {entry.digest: path for path, entry in reversed(manifest.entries.items())}
        sizes = manifest.sizes()
        self.size_bytes = sum(sizes[digest] for digest in needed_by)

    def packs(self, limit_bytes: int) -> Iterator[tuple[tuple[int, ...], list[Piece]]]:
        """Yield ranks and what to send them, in messages of about ``limit_bytes`` at most."""
        for ranks, digests in self._groups.items():
            pack: list[Piece] = []
            size = 0
            for digest in digests:
                for piece in self._pieces(digest, limit_bytes):
                    if pack and size + len(piece[2]) > limit_bytes:
                        yield ranks, pack
                        pack, size = [], 0
                    pack.append(piece)
                    size += len(piece[2])
            yield ranks, pack

    def _pieces(self, digest: bytes, limit_bytes: int) -> Iterator[Piece]:
        """Read one content. If the file has changed since, what is sent has another hash, and no host takes it."""
        path = self._paths[digest]
        entry = self._manifest.entries[path]
        full = os.path.join(self._top, path)
        offset = 0
        try:
            if entry.kind is Kind.LINK:
                yield digest, 0, os.fsencode(os.path.relpath(os.path.realpath(full), os.path.dirname(full)))
                return
            with open(full, "rb", buffering=0) as file:
                while data := file.read(min(limit_bytes, entry.size - offset)):
                    yield digest, offset, data
                    offset += len(data)
        except OSError:
            # Deleted meanwhile, which the next scan finds.
            return
        if entry.size == 0:
            yield digest, 0, b""


def targets(ranks: Sequence[int], num_hosts: int) -> list[slice]:
    """Return slices of the hosts that hold all of ``ranks``: few, so that few messages are sent."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1]:
            runs[-1][1] = rank + 1
        else:
            runs.append([rank, rank + 1])
    if len(runs) > MAX_SLICES:
        return [slice(0, num_hosts)]
    return [slice(start, stop) for start, stop in runs]
