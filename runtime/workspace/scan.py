"""Reads a working directory: which files it has that hosts need, and what they hold.

A file that looks as it did at the last scan (times, size, inode) is not read again, so an unchanged tree costs a stat
per file. One that was changed only just now is read again in any case: clocks of file systems are coarse.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgpack

from .errors import WorkspaceError, WorkspaceTooLarge
from .ignore import DEFAULT_RULES, GIT_IGNORE_FILE, IGNORE_FILE, NEVER_SENT, Rules, is_ignored
from .manifest import DIGEST_BYTES, MAX_PATH, Entry, Kind, Manifest, check_target, digest_of
from .units import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

MAX_BYTES: Final = 1 << 30
MAX_FILES: Final = 50_000
SETTLED_S: Final = 2.0
"""A file that was changed more recently than this may be changed again without looking different."""

_READ_BYTES: Final = 1 << 20
_SHOWN: Final = 8

Signature = tuple[int, int, int, int]
"""Times of the last change of content and of attributes, size, inode."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may be sent."""

    max_bytes: int = MAX_BYTES
    max_files: int = MAX_FILES


@dataclass(frozen=True, slots=True)
class Scan:
    """What a directory holds.

    Attributes:
        manifest: What is to be sent.
        skipped: What cannot be, each with the reason.
        num_read: Files whose content was read for it.
    """

    manifest: Manifest
    skipped: tuple[str, ...]
    num_read: int


@dataclass(slots=True)
class Cache:
    """Content hashes of files by path, each with what the file looked like."""

    known: dict[str, tuple[Signature, bytes]] = field(default_factory=dict)

    def find(self, path: str, signature: Signature) -> bytes | None:
        """Return the hash of a file that looks the same still."""
        found = self.known.get(path)
        return found[1] if found is not None and found[0] == signature else None

    def save(self, file: Path) -> None:
        """Write it for the next scan."""
        rows = [[path, list(signature), digest] for path, (signature, digest) in self.known.items()]
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}")
        temporary.write_bytes(bytes(msgpack.packb(rows, unicode_errors="surrogateescape") or b""))
        temporary.replace(file)


def load_cache(file: Path) -> Cache:
    """Read what :meth:`Cache.save` wrote; nothing where that is missing or of another kind."""
    try:
        rows: list[Any] = msgpack.unpackb(file.read_bytes(), unicode_errors="surrogateescape")
        return Cache(
            {
                str(path): ((mtime, ctime, size, inode), bytes(digest))
                for path, (mtime, ctime, size, inode), digest in rows
            }
        )
    except (OSError, ValueError, TypeError):
        return Cache()


def scan(
    directory: str, *, ignore: Sequence[str] = (), cache: Cache | None = None, limits: Limits | None = None
) -> Scan:
    """Return what ``directory`` holds besides what its rules say to ignore.

    Args:
        directory: An absolute path without links.
        ignore: Further rules, which come after those of the directory's files.
        cache: What the last scan found; brought up to date.
        limits: How much there may be.

    Raises:
        WorkspaceError: A file cannot be read, or its name cannot be sent.
        WorkspaceTooLarge: There is more than ``limits`` allow.
    """
    cache, limits = cache or Cache(), limits or Limits()
    walk = _Walk(directory, ignore)
    files = dict(walk.files())
    _check_limits(directory, {path: status.st_size for path, status in files.items()}, limits)
    entries: dict[str, Entry] = {}
    known: dict[str, tuple[Signature, bytes]] = {}
    num_read = 0
    now_ns = time.time_ns()
    for path, status in files.items():
        if stat.S_ISLNK(status.st_mode):
            target = walk.targets[path]
            entries[path] = Entry(digest_of(os.fsencode(target)), Kind.LINK, len(os.fsencode(target)))
            continue
        signature = signature_of(status)
        digest = cache.find(path, signature)
        if digest is None:
            digest, num_read = hash_file(os.path.join(directory, path)), num_read + 1
        if now_ns - max(signature[:2]) > SETTLED_S * 1e9:
            known[path] = signature, digest
        entries[path] = Entry(digest, kind_of(status), status.st_size)
    cache.known = known
    return Scan(Manifest(entries), tuple(walk.skipped), num_read)


def signature_of(status: os.stat_result) -> Signature:
    """What a file looks like, without reading it."""
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def kind_of(status: os.stat_result) -> Kind:
    """What a path is that exists."""
    if stat.S_ISLNK(status.st_mode):
        return Kind.LINK
    return Kind.EXECUTABLE if status.st_mode & stat.S_IXUSR else Kind.FILE


def hash_file(path: str) -> bytes:
    """Return the content hash of a regular file.

    Raises:
        WorkspaceError: It cannot be read.
    """
    digest = blake2b(digest_size=DIGEST_BYTES)
    try:
        with open(path, "rb", buffering=0) as file:
            while data := file.read(_READ_BYTES):
                digest.update(data)
    except OSError as error:
        raise WorkspaceError(
            f"{path} cannot be read ({error}); name it in {IGNORE_FILE} if hosts do not need it"
        ) from error
    return digest.digest()


class _Walk:
    """One pass over a directory, without what is ignored."""

    def __init__(self, top: str, ignore: Sequence[str]) -> None:
        self._top = top
        is_ours = os.path.exists(os.path.join(top, IGNORE_FILE))
        self._file = IGNORE_FILE if is_ours else GIT_IGNORE_FILE
        if is_ours:
            self._first, self._last = [Rules(DEFAULT_RULES)], [Rules(ignore)]
        else:
            self._first, self._last = _rules_above(top), [Rules(DEFAULT_RULES), Rules(ignore)]
        self.skipped: list[str] = []
        self.targets: dict[str, str] = {}

    def files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yield each file and link with its status."""
        return self._below("", self._first)

    def _below(self, base: str, rules: list[Rules]) -> Iterator[tuple[str, os.stat_result]]:
        where = os.path.join(self._top, base)
        try:
            with os.scandir(where) as found:
                listed = sorted(found, key=lambda each: each.name)
        except OSError as error:
            raise WorkspaceError(
                f"{where} cannot be read ({error}); name it in {IGNORE_FILE} if hosts do not need it"
            ) from error
        if any(each.name == self._file for each in listed):
            rules = [*rules, Rules(_lines(os.path.join(where, self._file)), base=base)]
        for each in listed:
            path = f"{base}/{each.name}" if base else each.name
            is_directory = each.is_dir(follow_symlinks=False)
            if each.name in NEVER_SENT or is_ignored([*rules, *self._last], path, each.name, is_directory=is_directory):
                continue
            if is_directory:
                yield from self._below(path, rules)
            else:
                yield from self._one(path, each)

    def _one(self, path: str, each: os.DirEntry[str]) -> Iterator[tuple[str, os.stat_result]]:
        try:
            status = each.stat(follow_symlinks=False)
        except FileNotFoundError:
            return
        if len(os.fsencode(path)) > MAX_PATH:
            self.skipped.append(f"{path[:200]}...: its path is too long")
        elif stat.S_ISREG(status.st_mode) or (stat.S_ISLNK(status.st_mode) and self._note_target(path)):
            yield path, status
        elif not stat.S_ISLNK(status.st_mode):
            self.skipped.append(f"{path}: neither a file nor a link")

    def _note_target(self, path: str) -> bool:
        """Note where a link leads, from its own directory; return False where that is outside."""
        full = os.path.join(self._top, path)
        target = os.path.relpath(os.path.realpath(full), os.path.dirname(full))
        try:
            check_target(path, target)
        except WorkspaceError:
            self.skipped.append(f"{path}: a link to what lies outside")
            return False
        self.targets[path] = target
        return True


def _rules_above(top: str) -> list[Rules]:
    """Rules of the directories above ``top`` that are in the same repository, the outermost first."""
    found: list[Rules] = []
    here = top
    while not os.path.exists(os.path.join(here, ".git")):
        if here == os.path.dirname(here):
            return []
        here = os.path.dirname(here)
        rules = Rules(_lines(os.path.join(here, GIT_IGNORE_FILE)), above=os.path.relpath(top, here))
        found.insert(0, rules)
    return found


def _lines(path: str) -> Iterable[str]:
    with contextlib.suppress(OSError):
        # The mark that some editors put first is no part of a rule.
        return Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    return ()


def _check_limits(directory: str, sizes: dict[str, int], limits: Limits) -> None:
    total = sum(sizes.values())
    if total > limits.max_bytes:
        by_size = sorted(sizes.items(), key=lambda each: -each[1])[:_SHOWN]
        largest = [(path, human_bytes(size)) for path, size in by_size]
        raise WorkspaceTooLarge(directory, human_bytes(total), human_bytes(limits.max_bytes), largest)
    if len(sizes) > limits.max_files:
        counts: dict[str, int] = {}
        for path in sizes:
            folder = path.rpartition("/")[0]
            counts[folder] = counts.get(folder, 0) + 1
        largest = [
            (f"{folder or '.'}/", f"{count:,} files")
            for folder, count in sorted(counts.items(), key=lambda each: -each[1])[:_SHOWN]
        ]
        raise WorkspaceTooLarge(directory, f"{len(sizes):,} files", f"{limits.max_files:,} files", largest)
