"""Delivers packets from one agent to another exactly once and in order, whatever the path in between loses or doubles.

Pure logic: no socket, thread or clock in this file. The ends guarantee delivery and not the hops: an ``Outbox`` numbers
packets from 1 and keeps them until they are acknowledged, an ``Inbox`` puts them in order and drops what it has seen.
Both belong to one pair of agents, each in one incarnation: when either end starts anew, both are made anew.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Any, Final, NamedTuple

WINDOW_MESSAGES: Final = 4096
"""Packets that one agent may have under way to another, unacknowledged."""

WINDOW_BYTES: Final = 32 << 20
"""Bytes that one agent may have under way to another; a larger packet goes alone."""

FIRST_TIMEOUT_S: Final = 0.5
LAST_TIMEOUT_S: Final = 2.0
"""Without progress packets are sent again after the first, then after twice that, at last every so often."""

SLOWEST_BYTES_PER_S: Final = 100e6
"""What is under way gets this long in addition: an encrypted link moves some 300 MB/s, and several pairs share it."""

RESENT_PACKETS: Final = 64
RESENT_BYTES: Final = 1 << 20
"""At most so much is sent again without a word from the other end that it arrives; at least one packet."""

ACK_PACKETS: Final = 64
"""Packets after which an acknowledgement is due at once."""

ACK_DELAY_S: Final = 0.005
"""How long an acknowledgement may wait for further packets; also the least time between two caused by duplicates."""


class Send(NamedTuple):
    """Command: put ``packet`` on the way, under the number ``seq``."""

    # A tuple and not a dataclass: making a frozen dataclass takes three times as long, and this is made per message.
    seq: int
    packet: Any


class Outbox:
    """The sender's end: what is under way, and behind it what waits for room in the window."""

    __slots__ = (
        "_acked",
        "_recover_to",
        "_resent_to",
        "_sent",
        "_since_s",
        "_timeout_s",
        "_unacked",
        "_unacked_bytes",
        "_waiting",
        "_waiting_bytes",
        "num_resent",
        "window_bytes",
        "window_messages",
    )

    def __init__(self, window_messages: int = WINDOW_MESSAGES, window_bytes: int = WINDOW_BYTES) -> None:
        if window_messages < 1 or window_bytes < 1:
            raise ValueError(
                f"a window of {window_messages} messages and {window_bytes} bytes lets nothing pass; both must be >= 1"
            )
        self.window_messages, self.window_bytes = window_messages, window_bytes
        self._unacked: deque[tuple[Send, int]] = deque()
        self._waiting: deque[tuple[Send, int]] = deque()
        self._unacked_bytes = self._waiting_bytes = 0
        self._acked = self._sent = 0
        self._since_s, self._timeout_s = 0.0, FIRST_TIMEOUT_S
        # Packets up to the former were under way at the last timeout; those up to the latter have been sent again.
        self._recover_to = self._resent_to = 0
        self.num_resent = 0

    @property
    def num_unacked(self) -> int:
        """Packets under way."""
        return len(self._unacked)

    @property
    def num_waiting(self) -> int:
        """Packets that the full window holds back."""
        return len(self._waiting)

    @property
    def size_bytes(self) -> int:
        """Bytes of all packets kept here, under way or waiting."""
        return self._unacked_bytes + self._waiting_bytes

    def add(self, packet: Any, size_bytes: int, *, now_s: float) -> list[Send]:
        """Take one packet; return it for sending, or nothing where it has to wait for the window."""
        waiting, unacked = self._waiting, self._unacked
        send = Send(self._sent + len(waiting) + 1, packet)
        if waiting or not self._has_room(size_bytes):
            waiting.append((send, size_bytes))
            self._waiting_bytes += size_bytes
            return []
        if not unacked:
            self._since_s = now_s
        unacked.append((send, size_bytes))
        self._unacked_bytes += size_bytes
        self._sent = send.seq
        return [send]

    def on_ack(self, cumulative: int, *, now_s: float) -> list[Send]:
        """Forget the packets up to number ``cumulative``; return what may be sent now.

        That is what waited for the window and, after a timeout, the next of the packets that were lost: they go out
        again as fast as their acknowledgements come in. An acknowledgement that tells nothing new changes nothing.

        Raises:
            ValueError: the packet of that number was never sent.
        """
        if cumulative > self._sent:
            raise ValueError(f"packet {cumulative} was acknowledged, but {self._sent} is the last that was sent")
        if cumulative <= self._acked:
            return []
        unacked = self._unacked
        for _ in range(cumulative - self._acked):
            self._unacked_bytes -= unacked.popleft()[1]
        self._acked = cumulative
        self._since_s, self._timeout_s = now_s, FIRST_TIMEOUT_S
        sends = self._resend_some() if self._resent_to <= cumulative < self._recover_to else []
        if self._waiting:
            self._send_waiting(sends)
        return sends

    def on_path_restored(self, *, now_s: float) -> list[Send]:
        """Return all that is under way, oldest first: whatever the old path carried may be lost."""
        self._since_s, self._timeout_s = now_s, FIRST_TIMEOUT_S
        self._recover_to = self._resent_to = 0
        self.num_resent += len(self._unacked)
        return [send for send, _ in self._unacked]

    def check(self, *, now_s: float) -> list[Send]:
        """Return the oldest packets once more when nothing has been acknowledged for too long."""
        if not self._unacked or now_s < self._deadline_s():
            return []
        self._since_s, self._timeout_s = now_s, min(2 * self._timeout_s, LAST_TIMEOUT_S)
        self._recover_to = self._sent
        return self._resend_some()

    def next_check_s(self) -> float | None:
        """When ``check`` may have something to do; None while nothing is under way."""
        return self._deadline_s() if self._unacked else None

    def _has_room(self, size_bytes: int) -> bool:
        num_unacked = len(self._unacked)
        return not num_unacked or (
            num_unacked < self.window_messages and self._unacked_bytes + size_bytes <= self.window_bytes
        )

    def _send_waiting(self, sends: list[Send]) -> None:
        waiting = self._waiting
        while waiting and self._has_room(waiting[0][1]):
            entry = waiting.popleft()
            self._unacked.append(entry)
            self._waiting_bytes -= entry[1]
            self._unacked_bytes += entry[1]
            self._sent = entry[0].seq
            sends.append(entry[0])

    def _resend_some(self) -> list[Send]:
        sends: list[Send] = []
        size_bytes = 0
        for send, packet_bytes in islice(self._unacked, min(RESENT_PACKETS, self._recover_to - self._acked)):
            size_bytes += packet_bytes
            if sends and size_bytes > RESENT_BYTES:
                break
            sends.append(send)
        self._resent_to = sends[-1].seq
        self.num_resent += len(sends)
        return sends

    def _deadline_s(self) -> float:
        return self._since_s + self._timeout_s + self._unacked_bytes / SLOWEST_BYTES_PER_S


class Inbox:
    """The receiver's end: what came too early, and what the sender has to be told."""

    __slots__ = (
        "_ahead",
        "_ahead_bytes",
        "_duplicate_ack_s",
        "_next_ack_s",
        "_told",
        "cumulative",
        "max_ahead",
        "max_ahead_bytes",
        "num_dropped",
        "num_duplicates",
    )

    def __init__(self, max_ahead: int = WINDOW_MESSAGES, max_ahead_bytes: int = 2 * WINDOW_BYTES) -> None:
        if max_ahead < 0 or max_ahead_bytes < 0:
            raise ValueError(f"cannot keep {max_ahead} packets of {max_ahead_bytes} bytes; neither may be negative")
        self.max_ahead, self.max_ahead_bytes = max_ahead, max_ahead_bytes
        self.cumulative = 0
        """Every packet up to this number has been delivered."""
        self.num_duplicates = self.num_dropped = 0
        self._ahead: dict[int, tuple[Any, int]] = {}
        self._ahead_bytes = 0
        self._told = 0
        self._next_ack_s: float | None = None
        self._duplicate_ack_s = float("-inf")

    @property
    def num_ahead(self) -> int:
        """Packets kept until those before them arrive."""
        return len(self._ahead)

    @property
    def next_ack_s(self) -> float | None:
        """When an acknowledgement is due (in the past or at the present: at once); None while there is none to send."""
        return self._next_ack_s

    def on_packet(self, seq: int, packet: Any, size_bytes: int = 0, *, now_s: float) -> list[Any]:
        """Take one packet; return those that may be delivered now, in order.

        A packet beyond the bounds is dropped, since its sender sends it again.

        Raises:
            ValueError: no sender numbers a packet ``seq``.
        """
        expected = self.cumulative + 1
        if seq == expected:
            self.cumulative = seq
            packets = [packet]
            if self._ahead:
                self._deliver_ahead(packets)
            self._note_ack(now_s)
            return packets
        if seq > expected:
            self._keep(seq, packet, size_bytes)
        elif seq < 1:
            raise ValueError(f"a packet has the number {seq}; the first is 1")
        else:
            self._on_duplicate(now_s)
        return []

    def take_ack(self) -> int | None:
        """Return the number to acknowledge and count it as told; None where the sender knows all.

        It may be taken before it is due, to travel along with something else.
        """
        if self._next_ack_s is None:
            return None
        self._next_ack_s = None
        self._told = self.cumulative
        return self._told

    def _note_ack(self, now_s: float) -> None:
        if self.cumulative - self._told >= ACK_PACKETS:
            self._next_ack_s = now_s
        elif self._next_ack_s is None:
            self._next_ack_s = now_s + ACK_DELAY_S

    def _on_duplicate(self, now_s: float) -> None:
        # The sender missed an acknowledgement. It may send a whole window again, which is answered once or twice only.
        self.num_duplicates += 1
        due_s = max(now_s, self._duplicate_ack_s + ACK_DELAY_S)
        if self._next_ack_s is None or due_s < self._next_ack_s:
            self._next_ack_s = self._duplicate_ack_s = due_s

    def _deliver_ahead(self, packets: list[Any]) -> None:
        ahead = self._ahead
        while (entry := ahead.pop(self.cumulative + 1, None)) is not None:
            self.cumulative += 1
            self._ahead_bytes -= entry[1]
            packets.append(entry[0])

    def _keep(self, seq: int, packet: Any, size_bytes: int) -> None:
        if seq in self._ahead:
            self.num_duplicates += 1
        elif seq - self.cumulative > self.max_ahead or self._ahead_bytes + size_bytes > self.max_ahead_bytes:
            self.num_dropped += 1
        else:
            self._ahead[seq] = (packet, size_bytes)
            self._ahead_bytes += size_bytes
