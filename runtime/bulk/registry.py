"""The memory that this process has registered: what others may read and write, until it is dropped."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from typing import TYPE_CHECKING, Final

from .table import NUM_SLOTS, TOKEN_BYTES, Table

if TYPE_CHECKING:
    from collections.abc import Callable

    from .memory import Memory

DROP_S: Final = 5.0
"""How long a drop waits for transfers under way; what is still in use then is kept until the process ends."""

_log = logging.getLogger("danaus")


class Registration:
    """One registered piece of memory."""

    def __init__(self, memory: Memory, slot: int, number: int) -> None:
        self.memory, self.slot, self.number = memory, slot, number
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.is_dropped = False
        self.users: dict[int, Callable[[], None] | None] = {}
        self.on_let_go: Callable[[], None] | None = None
        """Called before the memory is forgotten."""


class Registry:
    """All of this process's registrations. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.table = Table()
        self._changed = threading.Condition()
        self._live: dict[int, Registration] = {}
        self._free: list[int] = []
        self._next_slot = self._next_user = 0
        self._kept: list[Registration] = []

    def __len__(self) -> int:
        return len(self._live)

    def add(self, memory: Memory) -> Registration:
        """Register ``memory``, which is kept alive from now on.

        Raises:
            RuntimeError: Too much is registered already.
        """
        with self._changed:
            if not self._free and self._next_slot == NUM_SLOTS:
                raise RuntimeError(f"{NUM_SLOTS} buffers are registered in this process: drop() those no longer needed")
            if self._free:
                slot = self._free.pop()
            else:
                slot = self._next_slot
                self._next_slot += 1
            registration = Registration(memory, slot, self.table.advance(slot))
            self._live[slot] = registration
            return registration

    def find(self, slot: int, number: int, token: bytes) -> Registration | None:
        """What is registered there; None where it was dropped, or the token is not its own."""
        found = self._live.get(slot)
        if found is None or found.number != number or not secrets.compare_digest(found.token, token):
            return None
        return found

    def enter(self, registration: Registration, call_off: Callable[[], None] | None = None) -> int | None:
        """Begin to use the memory; return what to :meth:`leave` with, None where it is dropped.

        Args:
            registration: What is used.
            call_off: Called at a drop meanwhile: is to make the user leave soon.
        """
        with self._changed:
            if registration.is_dropped:
                return None
            self._next_user += 1
            registration.users[self._next_user] = call_off
            return self._next_user

    def leave(self, registration: Registration, user: int) -> None:
        """End what :meth:`enter` began."""
        with self._changed:
            del registration.users[user]
            self._changed.notify_all()

    def close_to_others(self, registration: Registration) -> bool:
        """Let nobody begin to use the memory any more; return False where it was dropped before."""
        with self._changed:
            if registration.is_dropped:
                return False
            registration.is_dropped = True
            self.table.advance(registration.slot)
            del self._live[registration.slot]
            for call_off in registration.users.values():
                if call_off is not None:
                    call_off()
            return True

    def is_unused(self, registration: Registration) -> bool:
        """Whether a dropped registration's memory is used by no transfer any more."""
        return not registration.users and self.table.is_unused(registration.slot)

    def let_go(self, registration: Registration) -> None:
        """Wait for the transfers under way, and forget the memory."""
        deadline_s, pause_s = time.monotonic() + DROP_S, 0.0005
        while not self.is_unused(registration):
            if time.monotonic() > deadline_s:
                _log.warning("a dropped buffer is still in use after %g s: its memory is kept", DROP_S)
                with self._changed:
                    self._kept.append(registration)
                return
            with self._changed:
                self._changed.wait(pause_s)
            pause_s = min(2 * pause_s, 0.02)
        if registration.on_let_go is not None:
            registration.on_let_go()
        with self._changed:
            self._free.append(registration.slot)

    def close(self) -> None:
        """Forget everything."""
        with self._changed:
            for registration in self._live.values():
                registration.is_dropped = True
            self._live.clear()
            self.table.close()
