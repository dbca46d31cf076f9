"""The actor that keeps one host's copy of a workspace while a controller sends to it."""

from __future__ import annotations

import contextlib
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgpack

from ..actor import Actor, endpoint
from ..context import context
from .errors import WorkspaceError
from .host_copy import HostCopy
from .manifest import DIGEST_BYTES, Manifest, unpack_manifest
from .paths import workspace_directory

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from .host_copy import Outcome

MAX_PACK: Final = 16 << 20
"""More than a sender puts into one message, before it is compressed."""

_SAMPLE_BYTES: Final = 64 << 10


class Receiver(Actor):
    """One host's end of a sync.

    Args:
        workspace_id: Names the workspace.
        bases: For tests: a folder for each rank, in place of the user's own.
    """

    def __init__(self, workspace_id: str, bases: Sequence[str] | None = None) -> None:
        instance = context().actor_instance
        self._host = instance.proc_runtime.host
        self._parts: list[bytes] = []
        self._manifest = Manifest({})
        self._copy: HostCopy | None = None
        self._base = workspace_directory(workspace_id, self._host) if bases is None else Path(bases[instance.rank.rank])

    @endpoint
    def root(self) -> bytes:
        """Return the hash of what is here; asked first."""
        with self._told():
            if self._copy is None:
                self._copy = HostCopy(self._base)
            return self._copy.root()

    @endpoint
    def offer(self, part: bytes, *, is_last: bool) -> bytes:
        """Take a part of the manifest; after the last one, return the hashes of the contents that are missing."""
        self._parts.append(part)
        if not is_last:
            return b""
        packed, self._parts = b"".join(self._parts), []
        with self._told():
            self._manifest = unpack_manifest(packed)
            return b"".join(self._opened().missing(self._manifest))

    @endpoint
    def put(self, pack: bytes, *, is_compressed: bool) -> None:
        """Take pieces of contents."""
        with self._told():
            copy = self._opened()
            for digest, offset, data in _unpack(pack, is_compressed=is_compressed):
                copy.put(digest, offset, data)

    @endpoint
    def commit(self) -> Outcome:
        """Put in place what was offered last."""
        with self._told():
            return self._opened().commit(self._manifest)

    def __cleanup__(self, exc: Exception | None) -> None:
        """Forget what was not put in place."""
        if self._copy is not None:
            self._copy.close()

    def _opened(self) -> HostCopy:
        if self._copy is None:
            raise WorkspaceError("asked for its root first, or it could not be opened")
        return self._copy

    @contextlib.contextmanager
    def _told(self) -> Generator[None]:
        """Have errors say where they happened."""
        try:
            yield
        except (OSError, WorkspaceError) as error:
            raise WorkspaceError(f"host {self._host}: {error}") from error


def pack_pieces(pieces: Sequence[tuple[bytes, int, bytes]]) -> tuple[bytes, bool]:
    """Pack pieces of contents (hash, offset, data) into one message; say whether compressing it was worth it."""
    plain = bytes(msgpack.packb(list(pieces)) or b"")
    # Weights and pictures do not shrink; to find that out by compressing all of them takes longer than to send them.
    if not _shrinks(plain[len(plain) // 2 :][:_SAMPLE_BYTES]):
        return plain, False
    return zlib.compress(plain, 1), True


def _shrinks(data: bytes) -> bool:
    return len(zlib.compress(data, 1)) < 0.9 * len(data)


def _unpack(pack: bytes, *, is_compressed: bool) -> list[Any]:
    try:
        if is_compressed:
            unpacker = zlib.decompressobj()
            pack = unpacker.decompress(pack, MAX_PACK)
            if not unpacker.eof:
                raise ValueError(f"more than {MAX_PACK} bytes")  # noqa: TRY301  told like any other
        pieces: list[Any] = msgpack.unpackb(pack)
        for digest, offset, data in pieces:
            is_piece = isinstance(digest, bytes) and len(digest) == DIGEST_BYTES and isinstance(data, bytes)
            if not is_piece or not isinstance(offset, int):
                raise TypeError("expected a hash, an offset and data")  # noqa: TRY301  told like any other
    except Exception as error:
        raise WorkspaceError(f"a malformed pack of files was refused: {error}") from error
    return pieces
