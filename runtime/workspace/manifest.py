"""What a tree of files holds: for each path a content hash, a kind and a size.

Pure data. A manifest that was unpacked holds only paths that stay below the directory that it will be written to: this
is checked here, once, for every path and every link.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

import msgpack

from .errors import WorkspaceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DIGEST_BYTES: Final = 16
MAX_FILES: Final = 1_000_000
MAX_PATH: Final = 3500
"""Below what the kernel takes, with room for the directory that it is put into."""
_MAX_PART: Final = 255
_MAX_PACKED: Final = 1 << 30


class Kind(IntEnum):
    """What a path is. The content of a link is its target."""

    FILE = 0
    EXECUTABLE = 1
    LINK = 2


@dataclass(frozen=True, slots=True)
class Entry:
    """One path's content."""

    digest: bytes
    kind: Kind
    size: int


def digest_of(data: bytes) -> bytes:
    """The hash that stands for a content."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


class Manifest:
    """The paths of a tree, relative to its top, with what each holds.

    Attributes:
        entries: By path, in order.
        root: A hash of all of it: equal for equal trees.
    """

    __slots__ = ("entries", "root")

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(sorted(entries.items()))
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for path, entry in self.entries.items():
            digest.update(os.fsencode(path) + b"\0" + bytes([entry.kind]) + entry.digest)
        self.root = digest.digest()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.entries.values())

    def sizes(self) -> dict[bytes, int]:
        """Each content's size by its hash; files with equal content are one."""
        return {entry.digest: entry.size for entry in self.entries.values()}

    def changed_since(self, other: Mapping[str, Entry]) -> list[str]:
        """Paths that are new here, or hold something else than in ``other``."""
        return [path for path, entry in self.entries.items() if other.get(path) != entry]

    def lacks(self, other: Iterable[str]) -> list[str]:
        """Those paths of ``other`` that are not here."""
        return [path for path in other if path not in self.entries]

    def pack(self) -> bytes:
        """Return it as bytes."""
        rows = [[path, entry.digest, int(entry.kind), entry.size] for path, entry in self.entries.items()]
        return zlib.compress(bytes(msgpack.packb(rows, unicode_errors="surrogateescape") or b""), 1)


def unpack_manifest(data: bytes) -> Manifest:
    """Load what :meth:`Manifest.pack` made, and check every path of it.

    Raises:
        WorkspaceError: It is malformed, or a path would leave the directory.
    """
    try:
        unpacker = zlib.decompressobj()
        rows: list[Any] = msgpack.unpackb(
            unpacker.decompress(data, _MAX_PACKED), unicode_errors="surrogateescape", max_array_len=MAX_FILES
        )
        entries = {_text(path): Entry(_digest(digest), Kind(kind), _size(size)) for path, digest, kind, size in rows}
    except WorkspaceError:
        raise
    except Exception as error:
        raise WorkspaceError(f"a malformed list of files was refused: {error}") from error
    check_paths(entries)
    return Manifest(entries)


def check_paths(entries: Mapping[str, Entry]) -> None:
    """Refuse paths that would leave the directory, and files that would have to be directories, too.

    Raises:
        WorkspaceError: There is such a path.
    """
    for path in entries:
        parts = path.split("/")
        if len(os.fsencode(path)) > MAX_PATH or "\0" in path or any(not _is_name(part) for part in parts):
            raise WorkspaceError(f"refused the path {path!r:.200}: expected names below the directory, without ..")
        for cut in range(1, len(parts)):
            if "/".join(parts[:cut]) in entries:
                raise WorkspaceError(f"refused the path {path!r:.200}: {'/'.join(parts[:cut])!r} is no directory")


def check_target(path: str, target: str) -> None:
    """Refuse a link at ``path`` that leads out of the directory.

    Parents of a path are directories, never links, so counting the leading ``..`` decides; one that comes later could
    follow another link and is refused.

    Raises:
        WorkspaceError: It does, or might.
    """
    parts = target.split("/")
    num_up = next((index for index, part in enumerate(parts) if part != ".."), len(parts))
    is_below = num_up <= path.count("/") and ".." not in parts[num_up:]
    if not target or "\0" in target or target.startswith("/") or not is_below:
        raise WorkspaceError(f"refused the link {path!r:.200} to {target!r:.200}: it leads out of the directory")


def _is_name(part: str) -> bool:
    return part not in {"", ".", ".."} and len(os.fsencode(part)) <= _MAX_PART


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a path, got {type(value).__qualname__}")
    return value


def _digest(value: Any) -> bytes:
    if not isinstance(value, bytes) or len(value) != DIGEST_BYTES:
        raise TypeError(f"expected a hash of {DIGEST_BYTES} bytes")
    return value


def _size(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 50:
        raise ValueError(f"{value!r:.40}: not a size")
    return value
