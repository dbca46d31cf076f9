"""How an idle actor comes back into a group that has lost a member, though its code asks for nothing.

    break --actor idle--> announced --all others announced or asking--> joining --> whole
                              ^                                            |
                              +---------some other is busy again-----------+

An announcement waits at the store and costs the actor nothing. Only when every member is ready to come do those that
have announced themselves join, on their own threads between two messages, and for a second at most: a mailbox never
waits for an actor elsewhere that has begun on something long.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..errors import DanausError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..calls.future import Future
    from .record import GroupRecord

_log = logging.getLogger("danaus")

JOIN_LIMIT_S: Final = 1.0
"""How long an idle actor's mailbox may wait for the other members."""


def rejoin_when_idle(record: GroupRecord) -> None:
    """Have the actor join the group's next generation between messages (I/O thread)."""
    _when_idle(record, partial(_announce, record))


def _when_idle(record: GroupRecord, task: Callable[[], None]) -> None:
    """Run ``task`` on the actor's thread, between two messages (any thread)."""

    def safely() -> None:
        if record.is_ended or record.is_whole or record.hole() is not None:
            return
        try:
            task()
        except (DanausError, RuntimeError, TimeoutError) as error:
            # The next death, or the next call, starts anew.
            _log.debug("%s was not joined: %s", record.line.label, error)

    def put() -> None:
        runner = record.local.actors.get(record.line.instance.key)
        if runner is not None:
            runner.put_task(safely)

    record.local.run_soon(put)


def _announce(record: GroupRecord) -> None:
    """Say that this member would come, and go on."""
    from .store import store_in

    member = record.membership()
    waiting: Future[bool] = store_in(member.places[0]).announce.call_one(member)
    record.announced = waiting
    waiting._when_done(partial(_on_answer, record, waiting))


def _on_answer(record: GroupRecord, waiting: Future[bool]) -> None:
    """Everybody is ready, or the store has gone (I/O thread)."""
    if record.announced is waiting:
        record.announced = None
        _when_idle(record, partial(_join, record, waiting))


def _join(record: GroupRecord, waiting: Future[Any]) -> None:
    try:
        may_form = waiting.get(0)
    except DanausError:
        # The store has died with its process: announce again where the next one is.
        rejoin_when_idle(record)
        return
    if not may_form:
        return
    try:
        record.get(JOIN_LIMIT_S, idle=True)
    except TimeoutError:
        rejoin_when_idle(record)
        return
    if record.on_reformed is not None:
        record.on_reformed(record.number)
