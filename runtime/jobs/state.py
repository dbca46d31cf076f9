"""What is remembered of a job between scripts: a private file per job, by which a second script finds it running.

The folder is ``DANAUS_STATE_DIR/jobs``, by default ``~/.local/state/danaus/jobs``, and only its owner may enter it:
NAME.json is the record, NAME.lock is held by whoever starts or ends the job, NAME/ has the key and what hosts write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..config import state_root
from .errors import JobError

if TYPE_CHECKING:
    from collections.abc import Generator

FORMAT: Final = 1
LOCK_LIMIT_S: Final = 120.0
LOCK_POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Record:
    """What is kept of a job that was started."""

    kind: str
    """Which class of job it is: a key of :data:`.kinds.KINDS`."""
    name: str
    spec: dict[str, Any]
    """Its fields, as JSON."""
    directory: str
    """Where its key and its hosts' output are."""
    key_file: str
    launched: dict[str, Any]
    """What the kind of job noted at its start, as process ids or the scheduler's."""
    created_s: float
    """``time.time()`` of the start."""
    replaced: int = 0
    """How many of its hosts have been replaced."""


class StateFile:
    """The record of the job ``name``, on disk."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.root = state_root() / "jobs"
        self.path = self.root / f"{name}.json"

    def load(self) -> Record | None:
        """Return the record, None if there is none.

        Raises:
            JobError: The file is not one of ours.
        """
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            fields = json.loads(text)
            if fields.pop("format") != FORMAT:
                raise ValueError("of another version of danaus")  # noqa: TRY301
            return Record(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise JobError(
                f"{self.path} is no record of a job that this danaus can read ({error}): end the job by its "
                "scheduler's own means, then remove that file"
            ) from error

    def save(self, record: Record) -> None:
        """Write the record; readers see the old one or the new one."""
        self._make_root()
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(record)}, indent=1)
        # mkstemp makes it readable by its owner only.
        handle, temporary = tempfile.mkstemp(prefix=f".{self.name}-", dir=self.root)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.replace(temporary, self.path)

    def remove(self, record: Record) -> None:
        """Forget the job: its record, its key, what its hosts wrote."""
        shutil.rmtree(record.directory, ignore_errors=True)
        self.path.unlink(missing_ok=True)

    def directory(self, parent: str | None = None) -> Path:
        """Return the path of the job's own folder, beside the record or in ``parent``."""
        return self.root / self.name if parent is None else Path(parent).absolute() / f"danaus-job-{self.name}"

    def make_directory(self, parent: str | None = None) -> Path:
        """Make the job's own folder, empty, and return its path."""
        self._make_root()
        path = self.directory(parent)
        if path.exists():
            # Of a start that was cut short: hosts that still look at it would mix with the new ones.
            shutil.rmtree(path)
        path.mkdir(mode=0o700, parents=parent is not None)
        return path

    @contextlib.contextmanager
    def lock(self) -> Generator[None]:
        """Keep other scripts, and other threads of this one, from starting or ending this job meanwhile.

        Raises:
            JobError: One of them has it for longer than two minutes.
        """
        self._make_root()
        with (self.root / f"{self.name}.lock").open("w", encoding="utf-8") as file:
            deadline_s = time.monotonic() + LOCK_LIMIT_S
            while not _try_lock(file.fileno()):
                if time.monotonic() > deadline_s:
                    raise JobError(
                        f"job {self.name!r}: another script has been starting or ending it for {LOCK_LIMIT_S:g} s; "
                        f"see who holds {file.name}: fuser {file.name}"
                    )
                time.sleep(LOCK_POLL_S)
            yield

    def _make_root(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = self.root.stat().st_mode
        if mode & 0o077:
            raise JobError(
                f"{self.root} has mode {mode & 0o777:o}, others of this machine could read the keys of jobs there: "
                f"chmod 700 {self.root}"
            )


def saved_jobs() -> list[str]:
    """Return the names of the jobs of which there is a record."""
    return sorted(path.stem for path in (state_root() / "jobs").glob("*.json"))


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
