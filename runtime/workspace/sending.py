"""The controller's end of a sync: what it asks the hosts, and what it sends them.

    roots of the copies --> manifest, where one differs --> contents that hosts lack --> put in place

All hosts of the mesh get the same messages, so a link of the tree carries each content once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from ..errors import ActorError
from .contents import Contents, targets
from .errors import WorkspaceError
from .manifest import DIGEST_BYTES, Manifest
from .progress import Progress
from .receiver import pack_pieces
from .units import human_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..calls.future import Future
    from .host_copy import Outcome

PART_BYTES: Final = 4 << 20
"""What one message carries at most."""
WINDOW: Final = 4
"""Messages that may be on their way at once."""
ATTEMPTS: Final = 5
"""How often to begin again where another controller has changed what is there."""


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What a sync did.

    Attributes:
        hosts: Hosts that hold the directory now, besides the one that sent it.
        files_sent: Contents that travelled; files with equal content are one, and what a host has already is none.
        bytes_sent: Their size; a content counts once, however many hosts got it.
        files_written: Files written on the host where most were.
        files_deleted: Files removed on the host where most were.
        seconds: How long it took.
        skipped: What cannot be sent, each with the reason.
    """

    hosts: int = 0
    files_sent: int = 0
    bytes_sent: int = 0
    files_written: int = 0
    files_deleted: int = 0
    seconds: float = 0.0
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        sent = f"{self.files_sent} file{'s' * (self.files_sent != 1)} ({human_bytes(self.bytes_sent)}) sent"
        hosts = f"{self.hosts} host{'s' * (self.hosts != 1)}"
        left_out = f", {len(self.skipped)} left out" if self.skipped else ""
        return f"{sent} to {hosts} in {self.seconds:.2f} s, {self.files_deleted} deleted{left_out}"


class Sending:
    """Speaks with the receivers until all hold what is to be sent.

    Args:
        receivers: One on each host.
        top: Where the files are.
        manifest: What they are.
        deadline_s: When to give up, by the monotonic clock.
        tell: Hears how far it is.
    """

    def __init__(
        self, receivers: Any, top: str, manifest: Manifest, deadline_s: float, tell: Callable[[Progress], object]
    ) -> None:
        self._receivers = receivers.flatten("host")
        self._top, self._manifest, self._deadline_s, self._tell = top, manifest, deadline_s, tell
        self._report = SyncReport()

    def run(self) -> SyncReport:
        """Send until every host holds it all.

        Raises:
            WorkspaceError: A host cannot write, or other controllers send something else there at the same time.
            TimeoutError: The time is over.
        """
        for _ in range(ATTEMPTS):
            roots = self._ask(self._receivers.root.call())
            behind = [rank for rank, root in enumerate(roots) if root != self._manifest.root]
            if behind:
                self._send(behind)
            outcomes = self._ask(self._receivers.commit.call()) if behind else []
            self._note(outcomes)
            if not any(outcome.missing for outcome in outcomes):
                return replace(self._report, hosts=len(roots))
        raise WorkspaceError(
            f"{self._top}: another controller keeps sending something else to these hosts; sync again when it is done"
        )

    def _note(self, outcomes: Sequence[Outcome]) -> None:
        self._report = replace(
            self._report,
            files_written=self._report.files_written + max((outcome.written for outcome in outcomes), default=0),
            files_deleted=self._report.files_deleted + max((outcome.deleted for outcome in outcomes), default=0),
        )

    def _send(self, behind: list[int]) -> None:
        """Have the ranks ``behind`` get what they lack."""
        needed_by: dict[bytes, list[int]] = {}
        for rank, missing in enumerate(self._offer()):
            for start in range(0, len(missing), DIGEST_BYTES):
                needed_by.setdefault(missing[start : start + DIGEST_BYTES], []).append(rank)
        contents = Contents(self._top, self._manifest, needed_by)
        progress = Progress(0, contents.size_bytes, len(needed_by), len(behind))
        self._tell(progress)
        pending: list[Future[Any]] = []
        for needing, pieces in contents.packs(PART_BYTES):
            pack, is_compressed = pack_pieces(pieces)
            pending += [
                self._receivers.slice(host=part).put.call(pack, is_compressed=is_compressed)
                for part in targets(needing, len(self._receivers))
            ]
            while len(pending) > WINDOW:
                self._ask(pending.pop(0))
            progress = replace(progress, bytes_sent=progress.bytes_sent + sum(len(piece[2]) for piece in pieces))
            self._tell(progress)
        for future in pending:
            self._ask(future)
        self._report = replace(
            self._report,
            files_sent=self._report.files_sent + len(needed_by),
            bytes_sent=self._report.bytes_sent + progress.bytes_sent,
        )

    def _offer(self) -> list[bytes]:
        """Tell all what there is; return the hashes of the contents that each lacks."""
        packed = self._manifest.pack()
        starts = range(0, len(packed), PART_BYTES)
        answers: list[bytes] = []
        for start in starts:
            part = packed[start : start + PART_BYTES]
            answers = self._ask(self._receivers.offer.call(part, is_last=start == starts[-1]))
        return answers

    def _ask(self, future: Future[Any]) -> list[Any]:
        """Wait for the answers of all hosts that were asked."""
        try:
            return list(future.get(timeout=max(0.0, self._deadline_s - time.monotonic())))
        except ActorError as error:
            if isinstance(error.exception, WorkspaceError):
                raise error.exception from error
            raise
