"""An agent's connections to the agents beside it in the tree: it connects to its children, its parent connects to it.

One DEALER for each child, one ROUTER for whoever is the parent; CURVE on all of them. A connection that breaks is made
again by ZeroMQ; what was lost with it is sent again by the ends (streams.py), not here.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import zmq

from ..messages.frames import NOBLOCK, received, send
from .door import connect, listen
from .endpoints import endpoint_of
from .packets import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import TypeAlias

    from .door import Door
    from .keys import KeyPair
    from .packets import Frames

    Watch: TypeAlias = Callable[[zmq.Socket[bytes], Callable[[], object]], object]
    Unwatch: TypeAlias = Callable[[zmq.Socket[bytes]], object]

PING_S: Final = 0.5
"""Time between two pings to a neighbour."""

QUIET_S: Final = 2.0
"""A neighbour not heard of for so long gets nothing but pings: it would only be queued."""

_BURST: Final = 256


class Neighbours:
    """The sockets of one agent.

    Args:
        context: ZeroMQ's; ``door`` guards it.
        slot: Of this agent.
        life: Of this agent.
        address: To listen at, as ``tcp://127.0.0.1:0``; None where nobody connects to this agent, as to the root.
        advertise: Host by which others reach it, where that is not the one it listens at.
        listener: Keys that this agent is known by.
        caller: Keys that it knocks with.
        door: Lets agents of the job in.
        watch: Has a socket polled.
        unwatch: Ends that.
        touch: Hears of sockets that something was sent on.
        on_message: Takes what comes: the neighbour's slot, and the frames.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        *,
        slot: int,
        life: int,
        address: str | None,
        advertise: str | None,
        listener: KeyPair,
        caller: KeyPair,
        door: Door,
        watch: Watch,
        unwatch: Unwatch,
        touch: Unwatch,
        on_message: Callable[[int, Frames], object],
    ) -> None:
        self._context, self._slot, self._life = context, slot, life
        self._listener_keys, self._caller_keys = listener, caller
        self._watch, self._unwatch, self._touch, self._on_message = watch, unwatch, touch, on_message
        self._children: dict[int, tuple[str, zmq.Socket[bytes]]] = {}
        self._parents: dict[int, bytes] = {}
        self.heard_s: dict[int, float] = {}
        self._router: zmq.Socket[bytes] | None = None
        self.endpoint = ""
        if address is not None:
            options: dict[int, int | bytes] = {zmq.ROUTER_HANDOVER: 1, zmq.SNDHWM: 0, zmq.RCVHWM: 0}
            self._router = listen(
                context, zmq.ROUTER, address, listener, door, max_message_bytes=MAX_MESSAGE_BYTES, options=options
            )
            self.endpoint = endpoint_of(self._router, advertise)
            watch(self._router, self._receive_above)

    def set_children(self, endpoints: dict[int, str], *, now_s: float) -> list[int]:
        """Be connected to these agents and no others; return the slots of those that are new."""
        for slot in [slot for slot, (endpoint, _) in self._children.items() if endpoints.get(slot) != endpoint]:
            self._drop(slot)
        new = [slot for slot in endpoints if slot not in self._children]
        for slot in new:
            name = f"{self._slot}.{self._life}.{os.urandom(4).hex()}".encode()
            socket = connect(
                self._context,
                zmq.DEALER,
                endpoints[slot],
                self._caller_keys,
                self._listener_keys.public,
                max_message_bytes=MAX_MESSAGE_BYTES,
                options={zmq.ROUTING_ID: name, zmq.SNDHWM: 0, zmq.RCVHWM: 0},
            )
            self._children[slot] = endpoints[slot], socket
            self.heard_s[slot] = now_s
            self._watch(socket, lambda slot=slot, socket=socket: self._receive_below(slot, socket))
        return new

    def _drop(self, slot: int) -> None:
        _, socket = self._children.pop(slot)
        self.heard_s.pop(slot, None)
        self._unwatch(socket)
        socket.close(0)

    def send(self, slot: int, frames: Frames, *, now_s: float) -> bool:
        """Send to a neighbour; False, with nothing sent, where there is no hope that it arrives now."""
        if now_s - self.heard_s.get(slot, -QUIET_S) >= QUIET_S:
            return False
        return self._send(slot, frames)

    def _send(self, slot: int, frames: Frames) -> bool:
        child = self._children.get(slot)
        try:
            if child is not None:
                self._touch(child[1])
                send(child[1], frames, NOBLOCK)
            elif self._router is not None and slot in self._parents:
                self._touch(self._router)
                send(self._router, [self._parents[slot], *frames], NOBLOCK)
            else:
                return False
        except zmq.Again:
            return False
        return True

    def ping(self, header: bytes) -> None:
        """Send a ping to every neighbour, also to those that are quiet."""
        for slot in [*self._children, *self._parents]:
            self._send(slot, [header])

    @property
    def listener(self) -> zmq.Socket[bytes] | None:
        """The socket that a parent connects to."""
        return self._router

    @property
    def children(self) -> Collection[int]:
        """Slots that this agent is connected to."""
        return self._children.keys()

    def forget_parent(self, slot: int) -> None:
        """Another agent is the parent now."""
        if self._parents.pop(slot, None) is not None and slot not in self._children:
            self.heard_s.pop(slot, None)

    def _receive_below(self, slot: int, socket: zmq.Socket[bytes]) -> None:
        for frames in received(socket, _BURST):
            self._on_message(slot, frames)
            if self._children.get(slot, ("", None))[1] is not socket:
                return

    def _receive_above(self) -> None:
        assert self._router is not None
        for identity, *frames in received(self._router, _BURST):
            slot = _slot_of(identity)
            if slot is not None and frames:
                self._parents[slot] = identity
                self._on_message(slot, frames)

    def close(self, linger_ms: int = 0) -> None:
        """Close every socket, once what is on its way has had ``linger_ms``."""
        for _, socket in self._children.values():
            self._unwatch(socket)
            socket.close(linger_ms)
        if self._router is not None:
            self._unwatch(self._router)
            self._router.close(linger_ms)
        self._children.clear()


def _slot_of(identity: bytes) -> int | None:
    """The slot of a parent, from what it calls itself."""
    text = identity.partition(b".")[0]
    return int(text) if text.isdigit() and len(text) <= 7 else None
