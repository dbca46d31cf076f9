"""The way up: an owner is asked, then its owner, at last the script; and where it is told what becomes of a loss."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..failure import pack_failure, unpack_failure
from ..messages import wire
from .asking import Asking

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..failure import MeshFailure
    from ..proc import LocalProc

TOLD_S: Final = 0.25
"""How long the script has to hear of a failure by a call of its own before the hook is called."""

_log = logging.getLogger("danaus")


class Tree:
    """A process's place in the tree of owners."""

    def __init__(self, local: LocalProc) -> None:
        self._local = local
        self.at_root: Callable[[MeshFailure], None] | None = None
        """Set in the controller: what to do with a failure that nobody has handled."""
        self.report: Callable[[MeshFailure], None] = lambda failure: _log.error("%s", failure.report())
        self.note: Callable[[MeshFailure, str], None] = lambda failure, text: _log.warning("%s: %s", failure.who, text)
        self.repaired: Callable[[MeshFailure, int], None] = lambda failure, incarnation: _log.warning(
            "%s: started again as incarnation %d", failure.who, incarnation
        )
        self._told: set[tuple[Any, ...]] = set()
        local.on_event["escalated"] = lambda fields: self._ask(
            fields["to"], unpack_failure(fields["failure"]), partial(self._after_owners_owner, fields["to"])
        )

    def _ask(
        self, owner: str, failure: MeshFailure, then: Callable[[MeshFailure, bool], None], *, lost: str = ""
    ) -> None:
        """Call the owner's ``__supervise__`` on its thread, then ``then(failure, handled)`` here."""
        Asking(self._local, owner, failure, then, lost).start()

    def _escalate(self, owner: str, failure: MeshFailure) -> None:
        """Hand ``failure`` to the owner of ``owner``."""
        runner = self._local.actors.get(owner)
        creator = runner.creator if runner is not None else None
        if creator is None and self.at_root is not None:
            self._local.run_at(time.monotonic() + TOLD_S, partial(self._at_root, failure))
            return
        proc, _, key = (creator or "controller.0/root").partition("/")
        self._local.send(proc, [wire.EVENT, "escalated", {"to": key, "failure": pack_failure(failure)}])

    def _after_owners_owner(self, key: str, failure: MeshFailure, handled: bool) -> None:
        if handled:
            self.note(failure, f"{key} has handled it")
        else:
            self._escalate(key, failure)

    def on_told(self, failure: MeshFailure) -> None:
        """A call of this process failed by ``failure``: whoever made it has been told (any thread)."""
        if self.at_root is not None:
            self._told.add(_identity(failure))

    def _at_root(self, failure: MeshFailure) -> None:
        is_told = any(_identity(each) in self._told for each in failure.chain())
        if not is_told and self.at_root is not None:
            self.at_root(failure)


def _identity(failure: MeshFailure) -> tuple[Any, ...]:
    return failure.mesh, failure.rank, failure.incarnation, failure.host, failure.pid
