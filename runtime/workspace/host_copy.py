"""A host's copy of a workspace, on disk: what it holds, what it lacks, and how it becomes like the controller's.

    BASE/copy/          the files
    BASE/record         which of them came from the controller, and what they looked like when written
    BASE/root           the hash of all of them, in hexadecimal digits
    BASE/lock           held while files are put in place
    BASE/incoming-X/    contents on their way, until all are there

Nothing is put in place before every content is there and verified. Files that programs wrote into the copy are left
alone. Contents that the copy has already, under any name, are not sent again. Several controllers may send at once:
each has its own incoming folder, and what one of them expected to find here may be gone when the other is done, of
which it is told.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgpack

from .errors import WorkspaceError
from .manifest import Entry, Kind, Manifest, check_target, digest_of
from .paths import COPY, ROOT_FILE
from .placing import place, remove
from .scan import Signature, hash_file, kind_of, signature_of

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

LOCK_S: Final = 60.0
"""How long to wait for another controller that puts its files in place."""
STALE_S: Final = 24 * 3600.0
"""Contents that arrived so long ago belong to nobody any more."""

Record = Mapping[str, tuple[Entry, Signature] | None]
"""What came from the controller; None where a sync was cut short."""

_RECORD: Final = "record"
_INCOMING: Final = "incoming-"
_POLL_S: Final = 0.02
_COPY_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an attempt to put files in place.

    Attributes:
        missing: Contents that were expected here but are not; if there are any, nothing was done.
        written: Files written.
        deleted: Files removed.
    """

    missing: tuple[bytes, ...] = ()
    written: int = 0
    deleted: int = 0


class HostCopy:
    """One controller's access to a copy.

    Args:
        base: Folder of this workspace on this host; made where it is not there.
        lock_s: Seconds to wait for another controller.
    """

    def __init__(self, base: Path, *, lock_s: float = LOCK_S) -> None:
        self._base, self._lock_s = base, lock_s
        self.top = base / COPY
        self.top.mkdir(mode=0o700, parents=True, exist_ok=True)
        base.chmod(0o700)
        self._drop_stale()
        self._incoming = tempfile.mkdtemp(prefix=_INCOMING, dir=base)
        self._wanted: dict[bytes, int] = {}

    def close(self) -> None:
        """Forget what arrived and was not put in place."""
        shutil.rmtree(self._incoming, ignore_errors=True)

    def manifest(self) -> Manifest:
        """What came from the controller and is here still, as it is now."""
        return Manifest(self._present(self._load_record()))

    def root(self) -> bytes:
        """The hash of that."""
        return self.manifest().root

    def missing(self, manifest: Manifest) -> list[bytes]:
        """Return which contents of ``manifest`` are not here under any name, and take them from now on."""
        present = self._present(self._load_record())
        changed = [manifest.entries[path] for path in manifest.changed_since(present)]
        sources = _sources(present)
        self._wanted = {entry.digest: entry.size for entry in changed if entry.digest not in sources}
        return [digest for digest in self._wanted if not self._has_arrived(digest)]

    def put(self, digest: bytes, offset: int, data: bytes) -> None:
        """Take a piece of a content; pieces come in order, and what is not wanted here is dropped.

        Raises:
            WorkspaceError: It is not the piece that follows.
        """
        size = self._wanted.get(digest)
        if size is None:
            return
        path = self._arriving(digest)
        with open(path, "ab" if offset else "wb") as file:
            if file.tell() != offset or offset + len(data) > size:
                raise WorkspaceError(f"piece at {offset} of {size} bytes came after {file.tell()}; sync again")
            file.write(data)
        if offset + len(data) == size and hash_file(path) != digest:
            # The file changed while it was sent: it will be missing.
            os.unlink(path)

    def commit(self, manifest: Manifest) -> Outcome:
        """Make the copy hold what ``manifest`` says, if every content is here.

        Raises:
            WorkspaceError: Another controller holds the lock for too long, or something is in the way.
            OSError: The file system refuses.
        """
        with self._lock():
            record = self._load_record()
            present = self._present(record)
            sources = _sources(present)
            changed = manifest.changed_since(present)
            missing = {
                manifest.entries[path].digest for path in changed if not self._can_make(manifest.entries[path], sources)
            }
            if missing:
                return Outcome(missing=tuple(missing))
            # If this process is killed from here on, all that it may have touched is known to be ours.
            self._save_record({**dict.fromkeys(changed), **record}, root=os.urandom(8))
            uses = Counter(manifest.entries[path].digest for path in changed)
            prepared = {path: self._prepare(path, manifest.entries[path], sources, uses) for path in changed}
            gone = manifest.lacks(record)
            for path in gone:
                remove(self.top, path)
            for path, temporary in prepared.items():
                place(self.top, path, temporary)
            looks = {path: (entry, signature_of(os.lstat(self.top / path))) for path, entry in manifest.entries.items()}
            self._save_record(looks, root=manifest.root)
            return Outcome(written=len(changed), deleted=len(gone))

    # what is here:

    def _present(self, record: Record) -> dict[str, Entry]:
        """What came from the controller, as it is now: programs may have changed it."""
        found: dict[str, Entry] = {}
        for path, noted in record.items():
            full = self.top / path
            try:
                status = os.lstat(full)
            except OSError:
                continue
            if noted is not None and noted[1] == signature_of(status) and noted[0].kind is kind_of(status):
                found[path] = noted[0]
            elif stat.S_ISREG(status.st_mode):
                found[path] = Entry(hash_file(str(full)), kind_of(status), status.st_size)
            elif stat.S_ISLNK(status.st_mode):
                target = os.fsencode(os.readlink(full))
                found[path] = Entry(digest_of(target), Kind.LINK, len(target))
        return found

    def _load_record(self) -> Record:
        try:
            rows: list[Any] = msgpack.unpackb(
                (self._base / _RECORD).read_bytes(), unicode_errors="surrogateescape", use_list=False
            )
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            # Files that the controller deletes from now on are told; what programs wrote must not be taken for such.
            return {}
        return {path: noted and (Entry(noted[0], Kind(noted[1]), noted[2]), noted[3]) for path, noted in rows}

    def _save_record(self, record: Record, *, root: bytes) -> None:
        rows = [
            [path, noted and [noted[0].digest, int(noted[0].kind), noted[0].size, noted[1]]]
            for path, noted in record.items()
        ]
        # Whoever keys something by the root must not find the new files under the old one.
        self._write(ROOT_FILE, root.hex().encode())
        self._write(_RECORD, bytes(msgpack.packb(rows, unicode_errors="surrogateescape") or b""))

    def _write(self, name: str, data: bytes) -> None:
        temporary = os.path.join(self._incoming, name)
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, self._base / name)

    # what arrives:

    def _arriving(self, digest: bytes) -> str:
        return os.path.join(self._incoming, digest.hex())

    def _has_arrived(self, digest: bytes) -> bool:
        try:
            return os.stat(self._arriving(digest)).st_size == self._wanted[digest]
        except (OSError, KeyError):
            return False

    def _can_make(self, entry: Entry, sources: dict[bytes, str]) -> bool:
        return entry.digest in sources or self._has_arrived(entry.digest)

    def _prepare(self, path: str, entry: Entry, sources: dict[bytes, str], uses: Counter[bytes]) -> str:
        """Make the file that will be ``path``, beside the copy; return its name."""
        uses[entry.digest] -= 1
        descriptor, temporary = tempfile.mkstemp(prefix="new-", dir=self._incoming)
        has_arrived = self._has_arrived(entry.digest)
        source = self._arriving(entry.digest) if has_arrived else str(self.top / sources[entry.digest])
        with os.fdopen(descriptor, "wb") as file, open(source, "rb") as content:
            if has_arrived and not uses[entry.digest]:
                os.replace(source, temporary)
            else:
                shutil.copyfileobj(content, file, _COPY_BYTES)
        if not has_arrived and hash_file(temporary) != entry.digest:
            raise WorkspaceError(f"{source} changed while it was copied; sync again")
        if entry.kind is Kind.LINK:
            with open(temporary, "rb") as file:
                target = os.fsdecode(file.read())
            check_target(path, target)
            os.unlink(temporary)
            os.symlink(target, temporary)
        else:
            os.chmod(temporary, 0o700 if entry.kind is Kind.EXECUTABLE else 0o600)
        return temporary

    # others:

    @contextlib.contextmanager
    def _lock(self) -> Generator[None]:
        deadline_s = time.monotonic() + self._lock_s
        descriptor = os.open(self._base / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline_s:
                        raise WorkspaceError(
                            f"another controller has been writing to {self.top} for {self._lock_s:g} s; wait for it, "
                            "or end it, and sync again"
                        ) from None
                    time.sleep(_POLL_S)
            yield
        finally:
            os.close(descriptor)

    def _drop_stale(self) -> None:
        """Remove what arrived for controllers that were killed."""
        for folder in self._base.glob(f"{_INCOMING}*"):
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > STALE_S:
                    shutil.rmtree(folder)


def _sources(present: dict[str, Entry]) -> dict[bytes, str]:
    """Where each content is that need not be sent."""
    return {entry.digest: path for path, entry in present.items() if entry.kind is not Kind.LINK}
