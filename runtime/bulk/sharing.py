"""Fetches a lent payload once per host, for all of its processes that got it with one cast.

Whoever binds the payload's socket first fetches it, into memory of its own that it then hands to the others as a
descriptor; they connect and wait. The kernel elects: where the first dies or fails, the next binds. No file is left.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Final

from . import stream
from .lending import fetch_into, size_of, split

if TYPE_CHECKING:
    from .client import Clients
    from .progress import Progress
    from .reference import Reference

HAND_OUT_S: Final = 20.0
"""How long a fetched payload waits for processes that have not asked for it; they fetch it again."""

_POLL_S: Final = 0.5
_PAUSE_S: Final = 0.005
_BACKLOG: Final = 1024


def fetch_shared(clients: Clients, reference: Reference, num_sharers: int, progress: Progress) -> list[memoryview]:
    """Return a payload's buffers, read-only, in memory that this host's processes share.

    Args:
        clients: This process's connections.
        reference: The payload.
        num_sharers: How many processes of this host got it.
        progress: Of the fetch, if it is this process that fetches.

    Raises:
        DanausError: It did not come: the owner died, gave it up, or could not be reached in time.
    """
    name = _name(reference)
    while True:
        progress.check()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(name)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise
            pages = _ask(name, reference, progress)
        else:
            pages = _fetch(clients, reference, listener, num_sharers - 1, progress)
        if pages is not None:
            return split(memoryview(pages).toreadonly(), reference.segment)
        progress.check_owner()
        progress.pause(_PAUSE_S)


def _name(reference: Reference) -> str:
    """Known to those alone who know the payload's token."""
    assert reference.way is not None
    text = f"{reference.owner} {reference.segment.lease_id}".encode()
    return f"\0danaus-share-{hashlib.blake2b(text, key=reference.way[3], digest_size=16).hexdigest()}"


def _fetch(
    clients: Clients, reference: Reference, listener: socket.socket, num_others: int, progress: Progress
) -> mmap.mmap:
    try:
        size_bytes = size_of(reference.segment)
        descriptor = os.memfd_create("danaus-shared", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, size_bytes)
            pages = mmap.mmap(descriptor, size_bytes)
            fetch_into(clients, reference, memoryview(pages), progress)
        except BaseException:
            os.close(descriptor)
            raise
    except BaseException:
        listener.close()
        raise
    arguments = (clients, listener, descriptor, num_others)
    threading.Thread(target=_hand_out, args=arguments, name="danaus-bulk-share", daemon=True).start()
    return pages


def _hand_out(clients: Clients, listener: socket.socket, descriptor: int, num_others: int) -> None:
    end_s = time.monotonic() + HAND_OUT_S
    try:
        while num_others and time.monotonic() < end_s and not clients.is_closed:
            if not stream.is_readable(listener.fileno(), min(_POLL_S, stream.remaining_s(end_s))):
                continue
            # Who asked may have gone again.
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                if stream.is_own_user(connection, os.geteuid()):
                    socket.send_fds(connection, [b"x"], [descriptor])
                    num_others -= 1
    finally:
        listener.close()
        os.close(descriptor)


def _ask(name: str, reference: Reference, progress: Progress) -> mmap.mmap | None:
    """Wait for the process that fetches; return None where it has gone, or given up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_POLL_S)
        try:
            connection.connect(name)
            if not stream.is_own_user(connection, os.geteuid()):
                return None
            descriptor = _receive_descriptor(connection, progress)
        except OSError:
            return None
    if descriptor is None:
        return None
    try:
        return mmap.mmap(descriptor, size_of(reference.segment), prot=mmap.PROT_READ)
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)


def _receive_descriptor(connection: socket.socket, progress: Progress) -> int | None:
    while True:
        try:
            data, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
        except TimeoutError:
            progress.check_owner()
            continue
        return descriptors[0] if data and descriptors else None
