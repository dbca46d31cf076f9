"""One forming of a process group: its members' processes, its connections, and how both end.

    FORMING --all connected--> WHOLE --a member is lost--> BROKEN
       |                                                     ^
       +------------------a member is lost-------------------+

A generation ends once and for all, on whatever thread hears of it first: usually the I/O thread, when a member's
process has died. Whoever is blocked in one of its collectives, or in its forming, then gets an error in milliseconds.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Final

from ..address import host_of
from ..config import grace_s
from .sockets import answer_for_missing, cut, tickets_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..failure import MeshFailure
    from .roll_call import Formed
    from .sockets import Address

NEWS_LIMIT_S: Final = 0.1
"""How long an error that a lost member explains waits for the news of it, on one host."""

_TOLD_S: Final = 2.0
"""How long it may take until all hosts have heard that one counts as lost."""

_changed = threading.Condition()


class Generation:
    """One generation of one group, in one member.

    Args:
        formed: What the roll call gave.
        place: This member's place in the group.
        store: The `RuntimeStore` that it forms through.

    Attributes:
        procs: Addresses of the members' processes, in group order.
        is_broken: Whether it has ended by the loss of a member; for good.
        failure: The end of the member that was lost, where it is known.
        reason: Why it has ended, in words.
        ended_s: ``time.monotonic()`` at its end.
    """

    def __init__(self, formed: Formed, place: int, store: Any) -> None:
        self.number = formed.generation
        self.procs = tuple(member.proc for member in formed.members)
        self.store = store
        self.is_formed = self.is_broken = False
        self.failure: MeshFailure | None = None
        self.reason = ""
        self.ended_s = 0.0
        self._place = place
        self._listeners: set[Address] = {each.listener for each in formed.members if each.listener is not None}
        self._own_listener = formed.members[place].listener
        self._aborts: list[Callable[[], object]] = []

    def end(self, failure: MeshFailure | None, reason: str = "") -> None:
        """A member is lost: release whoever waits for it (any thread; never blocks for long)."""
        with _changed:
            if self.is_broken:
                return
            self.failure, self.reason = failure, reason or str(failure)
            self.ended_s = time.monotonic()
            self.is_broken = True
        self.store.state.refusal = f"generation {self.number} of the group has ended: {self.reason}"
        self._release()
        with _changed:
            _changed.notify_all()

    def finish(self, aborts: Iterable[Callable[[], object]] = ()) -> None:
        """All members are connected.

        Args:
            aborts: End what their collectives wait for, and may block.

        Raises:
            RuntimeError: The generation has ended meanwhile.
        """
        self._aborts = list(aborts)
        self.is_formed = True
        if self.is_broken:
            # What was connected after the end is still open.
            self._release()
            raise RuntimeError(self.reason)

    def _release(self) -> None:
        for abort in self._aborts:
            threading.Thread(target=abort, name="danaus-abort", daemon=True).start()
        cut(self._listeners)
        if not self.is_formed and self._own_listener is not None:
            answer_for_missing(self._own_listener, self._tickets())

    def _tickets(self) -> tuple[int, ...]:
        from .c10d import GLOO_KEYS

        for key, value in self.store.state.published.copy().items():
            if key.startswith(GLOO_KEYS) and key.endswith(f"/{self._place}"):
                return tickets_in(value, len(self.procs))
        return ()


def news_limit_s(procs: Iterable[str]) -> float:
    """Return how long after the connections of a member have broken the news of its loss may come."""
    is_on_one = len(set(map(host_of, procs))) < 2
    return NEWS_LIMIT_S + (0.0 if is_on_one else grace_s() + _TOLD_S)


def wait_broken(generations: Iterable[Generation], timeout_s: float) -> Generation | None:
    """Return the one that ended last, waiting for the first to end; None where none has ended in time."""
    known = list(generations)
    with _changed:
        _changed.wait_for(lambda: any(each.is_broken for each in known), timeout_s)
    return max((each for each in known if each.is_broken), key=lambda each: each.ended_s, default=None)
