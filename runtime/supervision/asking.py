"""Asks the owner of a mesh about a loss in it: by its ``__supervise__``, on its own thread, for a limited time."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

from ..address import place_of
from ..hooks import Question

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..failure import MeshFailure
    from ..proc import LocalProc

SUPERVISE_S: Final = 10.0
"""How long a ``__supervise__`` may take, its turn in the mailbox included, before the failure goes up."""

LOOK_S: Final = 0.1
"""Pause between looks at whether an owner that was asked can answer at all."""

_log = logging.getLogger("danaus")


class Asking:
    """One question, and the one answer to it that counts; all of it on the I/O thread.

    Args:
        local: This process.
        owner: Key of the actor that is asked.
        failure: What it is asked about.
        then: Gets the failure and whether the owner has handled it; not called where the owner raised, which fails the
            owner and stops what it owned.
        lost: Address of the process that was lost, if the owner may want it back.
    """

    def __init__(
        self, local: LocalProc, owner: str, failure: MeshFailure, then: Callable[[MeshFailure, bool], None], lost: str
    ) -> None:
        self._local, self._owner, self._failure, self._then = local, owner, failure, then
        self._place = place_of(lost)
        self._is_answered = False

    def start(self) -> None:
        """Ask, or answer for an owner that has nothing to say."""
        runner = self._local.actors.get(self._owner)
        if runner is None or not runner.has_hook("__supervise__"):
            self._answer(False)
            return
        runner.ask(Question("__supervise__", self._failure, self._reply, cause=self._failure))
        now_s = time.monotonic()
        self._local.run_at(now_s + SUPERVISE_S, self._on_late)
        if self._place:
            self._local.run_at(now_s + LOOK_S, self._look)

    def _reply(self, handled: bool | None) -> None:
        # On the actor's thread.
        self._local.run_soon(lambda: self._answer(handled))

    def _answer(self, handled: bool | None) -> None:
        if not self._is_answered:
            self._is_answered = True
            if handled is not None:
                self._then(self._failure, handled)

    def _on_late(self) -> None:
        if not self._is_answered:
            _log.warning("%s: __supervise__ has not returned within %g s", self._owner, SUPERVISE_S)
            self._answer(False)

    def _look(self) -> None:
        """An owner that blocks its thread until the lost rank answers has no turn to say so: it wants it back."""
        if self._is_answered:
            return
        waits = self._local._waits
        if waits is not None and waits.is_blocked_on(self._owner, self._place):
            self._answer(False)
        else:
            self._local.run_at(time.monotonic() + LOOK_S, self._look)
