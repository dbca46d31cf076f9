"""Has the members of an actor mesh tell each other small things, through the store of the first member's process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ActorError
from .store import store_in

if TYPE_CHECKING:
    from ..context import ActorInstance


def places_of(instance: ActorInstance) -> tuple[str, ...]:
    """Where the members of an actor's mesh run, whatever their incarnation, in rank order; its own, outside of one."""
    mesh = instance.mesh
    if mesh is None:
        return (instance.proc_id,)
    return tuple(f"{mesh._procs._mesh_id}.{rank}" for rank in mesh._region.ranks())


def exchange(instance: ActorInstance, topic: str, value: bytes, *, timeout_s: float) -> list[bytes]:
    """Return what every member has said on a topic, in rank order; blocks until all have.

    Args:
        instance: The calling actor.
        topic: Equal for all members; each topic is for one exchange.
        value: What this member says.
        timeout_s: How long to wait for the others.

    Raises:
        TimeoutError: Some members have not come; the message names them.
        SupervisionError: The first member's process is gone.
    """
    places = places_of(instance)
    store, space = store_in(places[0]), f"{instance.key}#{topic}"
    keys = [f"rank {rank}" for rank in range(len(places))]
    try:
        store.put.call_one(space, {keys[instance.rank.rank]: value}).get(timeout_s)
        # The store keeps the time; it is late only where its process is stuck.
        return store.get.call_one(space, keys, timeout_s).get(timeout_s + 10.0)
    except ActorError as error:
        if not isinstance(error.exception, TimeoutError):
            raise
        raise TimeoutError(f"{topic} of {instance.name!r} needs all of its ranks: {error.exception}") from error
