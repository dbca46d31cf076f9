"""Which errors of an actor's code are only what the loss of another member made of a collective.

Gloo says "connection closed by peer" before anybody has heard which peer, and why. So an error that looks like it waits
a moment for the news; then whoever called hears of the member that was lost, and the actor is not to blame.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import GroupBroken, SupervisionError
from .generation import wait_broken
from .record import CAUSE_LIMIT_S
from .registry import records_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..failure import MeshFailure
    from .record import GroupRecord

_log = logging.getLogger("danaus")


def cause_of(actor_key: str, error: BaseException) -> MeshFailure | GroupBroken | None:
    """Return what ``error`` follows from, where the actor was only the first to notice; None where it is its own.

    Waits up to 0.1 s for the news, on the actor's thread. An actor without groups is answered at once.

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
    broken = wait_broken(by_generation, CAUSE_LIMIT_S)
    if broken is None:
        return None
    record = by_generation[broken]
    if broken.failure is not None:
        return _told_by(record, broken.failure)
    return GroupBroken(record.line.dims, broken.number, broken.number + 1, broken.reason)


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
