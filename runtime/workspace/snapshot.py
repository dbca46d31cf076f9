"""What was last sent, as the host that sends keeps it: hosts get this, whatever becomes of the directory meanwhile."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from .contents import Contents
from .errors import WorkspaceError
from .host_copy import HostCopy
from .manifest import Manifest
from .paths import workspace_directory
from .scan import load_cache, scan

if TYPE_CHECKING:
    from collections.abc import Generator

    from .paths import Workspace

ATTEMPTS: Final = 5
"""How often to begin again where files keep changing while they are read."""

_PIECE_BYTES: Final = 4 << 20


class Snapshot:
    """The last state of a workspace that was sent from here.

    Args:
        workspace: What is sent.
        host: Name of this host.

    Attributes:
        top: Where its files are.
        manifest: What they are.
        skipped: What cannot be sent, each with the reason.
    """

    def __init__(self, workspace: Workspace, host: str) -> None:
        # Not the copy of a daemon that runs on this machine, too.
        base = workspace_directory(f"{workspace.workspace_id}.sent", host)
        self._workspace, self._cache_file = workspace, base / "scanned"
        with _told():
            self._copy = HostCopy(base)
        self.top = str(self._copy.top)
        self.manifest = Manifest({})
        self.skipped: tuple[str, ...] = ()

    def close(self) -> None:
        """Forget what is not part of it."""
        self._copy.close()

    def take(self) -> None:
        """Make it what the directory holds now.

        Raises:
            WorkspaceTooLarge: The directory holds more than the limits.
            WorkspaceError: It cannot be read, or files keep changing while they are read.
        """
        cache = load_cache(self._cache_file)
        for _ in range(ATTEMPTS):
            here, limits = self._workspace.here, self._workspace.limits
            found = scan(here, ignore=self._workspace.ignore, cache=cache, limits=limits)
            with _told():
                is_whole = self._read(found.manifest)
            if is_whole:
                self.manifest, self.skipped = found.manifest, found.skipped
                with contextlib.suppress(OSError):
                    # Else the next one reads every file again.
                    cache.save(self._cache_file)
                return
        raise WorkspaceError(
            f"{self._workspace.here}: files there kept changing while they were read, {ATTEMPTS} times; end what "
            "writes them, or name them in .danausignore"
        )

    def _read(self, manifest: Manifest) -> bool:
        """Take over what ``manifest`` says; return False where that has changed meanwhile."""
        needed_by = {digest: (0,) for digest in self._copy.missing(manifest)}
        for _, pieces in Contents(self._workspace.here, manifest, needed_by).packs(_PIECE_BYTES):
            for piece in pieces:
                self._copy.put(*piece)
        return not self._copy.commit(manifest).missing

    def reuse(self) -> bool:
        """Leave it as it was sent last; return False where there is nothing of it."""
        self.manifest = self._copy.manifest()
        return bool(self.manifest.entries)


@contextlib.contextmanager
def _told() -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise WorkspaceError(f"{error}; set DANAUS_STATE_DIR to a directory with room that can be written") from error
