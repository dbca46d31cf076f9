"""Counts the connections to a listener that came to nothing: whoever spoke no ZMTP, had no key, or gave up half-way.

Only those who reach the door are refused there; others fail before that, inside libzmq, which tells of it by events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

if TYPE_CHECKING:
    from zmq.utils.monitor import _MonitorMessage

_BATCH: Final = 512


class Attempts:
    """Who tries to get in.

    Args:
        listener: It has been bound. Close this before it.

    Attributes:
        socket: Poll it for input, then call :meth:`serve`; what is not taken is kept, by a thread of libzmq's.
        num_accepted: Connections so far.
        num_let_in: Those that had the key.
    """

    def __init__(self, listener: zmq.Socket[Any]) -> None:
        self._listener = listener
        self.num_accepted = self.num_let_in = 0
        address = f"inproc://danaus-attempts-{id(listener):x}"
        listener.monitor(address, zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self.socket: zmq.Socket[Any] = listener.context.socket(zmq.PAIR)
        self.socket.linger = 0
        # A full queue would hold up the thread of libzmq's that serves all connections.
        self.socket.rcvhwm = 0
        self.socket.connect(address)

    @property
    def num_failed(self) -> int:
        """Connections that did not get in; those that are still trying are among them."""
        return self.num_accepted - self.num_let_in

    def serve(self) -> None:
        """Count what has happened, without blocking."""
        for _ in range(_BATCH):
            try:
                message: _MonitorMessage = parse_monitor_message(self.socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            if message["event"] == zmq.EVENT_ACCEPTED:
                self.num_accepted += 1
            elif message["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.num_let_in += 1

    def close(self) -> None:
        """Count no more."""
        # In this order: libzmq would wait for ever to tell a socket that is gone.
        if not self._listener.closed:
            self._listener.disable_monitor()
        self.socket.close(0)
