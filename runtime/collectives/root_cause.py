"""Which errors of an actor's code are only what the loss of another member made of a collective.

Gloo says "connection closed by peer" before anybody has heard which peer, and why. So an error that looks like it waits
a moment for the news; then whoever called hears of the member that was lost, and the actor is not to blame.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ..errors import GroupBroken, SupervisionError
from .generation import NEWS_LIMIT_S, news_limit_s, wait_broken
from .registry import records_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..failure import MeshFailure
    from .record import GroupRecord

_log = logging.getLogger("danaus")

_CONNECTION_WORDS: Final = ("connect", "peer", "closed", "reset", "broken pipe", "network", "remote", "unreachable")


def cause_of(actor_key: str, error: BaseException) -> MeshFailure | GroupBroken | None:
    """Return what ``error`` follows from, where the actor was only the first to notice; None where it is its own.

    Waits up to 0.1 s for the news, on the actor's thread; up to the hosts' grace period where connections to members
    on other hosts have broken. An actor without groups is answered at once.

    Returns:
        The end of the member that was lost, GroupBroken where a living one ended the generation, or None.
    """
    records = records_of(actor_key)
    if not records:
        return None
    errors = list(_chain(error))
    for each in errors:
        if isinstance(each, SupervisionError) and each.failure in [record.hole() for record in records]:
            return _told_by(records[0], each.failure)
    if not any(map(_is_of_collective, errors)):
        return None
    by_generation = {record.current: record for record in records if record.current is not None}
    limit_s = max((news_limit_of(error, each.procs) for each in by_generation), default=0.0)
    broken = wait_broken(by_generation, limit_s)
    if broken is None:
        return None
    record = by_generation[broken]
    if broken.failure is not None:
        return _told_by(record, broken.failure)
    return GroupBroken(record.line.dims, broken.number, broken.number + 1, broken.reason)


def news_limit_of(error: BaseException, procs: Iterable[str]) -> float:
    """Return within how many seconds the loss of one of ``procs`` would be known, if ``error`` may follow from it.

    0 where it is an error of its own.
    """
    # Else nothing of torch's has been raised, and to import it takes long.
    if "torch.distributed" not in sys.modules:
        return 0.0
    errors = list(_chain(error))
    if any(map(_is_of_connection, errors)):
        return news_limit_s(procs)
    return NEWS_LIMIT_S if any(map(_is_of_collective, errors)) else 0.0


def _told_by(record: GroupRecord, failure: MeshFailure) -> MeshFailure:
    noticed = f"rank {record.line.instance.rank.rank} of {record.line.instance.name!r} lost it in a collective"
    return replace(failure, detail=f"{failure.detail}; {noticed}" if failure.detail else noticed)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from or while handling."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _is_of_collective(error: BaseException) -> bool:
    import torch.distributed as dist

    if isinstance(error, (GroupBroken, dist.DistError)):
        return True
    # What C++ throws comes as a plain RuntimeError. Gloo's begin with their place in its sources.
    return type(error) is RuntimeError and any(name in str(error).lower() for name in ("gloo", "nccl"))


def _is_of_connection(error: BaseException) -> bool:
    """Whether a collective has lost a connection; other errors of collectives have nothing to do with hosts."""
    return _is_of_collective(error) and any(word in str(error).lower() for word in _CONNECTION_WORDS)
