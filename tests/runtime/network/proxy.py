"""A TCP proxy that stands between two ends of a test: it adds delay, holds bytes back, and cuts connections.

TCP loses no bytes within a connection, so neither does the proxy: a cut direction holds them until it is healed, as a
network does that drops packets for a while. What is lost is lost with a connection that is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from enum import Enum
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

CHUNK_BYTES = 1 << 16
HELD_CHUNKS = 256
"""Per connection and direction; then its sender feels that nobody reads."""

LIMIT_S = 10.0

T = TypeVar("T")


class Direction(Enum):
    """Which bytes: those from the end that connected, or those to it."""

    OUT = "out"
    BACK = "back"


BOTH = (Direction.OUT, Direction.BACK)


class _Ends:
    """The two sockets of one connection, the further one as soon as it is there."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writers = [writer]
        self.killed = False

    def add(self, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        if self.killed:
            self.kill()

    def kill(self) -> None:
        self.killed = True
        for writer in self.writers:
            # With no time to linger the close is a reset, and the kernel forgets what is still to be sent.
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy:
    """Passes connections on to ``target``; all its methods may be called from any thread and return when it is so.

    Args:
        target: As ``tcp://127.0.0.1:1234``.
        delay_s: Added to every chunk, in each direction; may be set at any time.
    """

    def __init__(self, target: str, *, delay_s: float = 0.0) -> None:
        host, _, port = target.removeprefix("tcp://").rpartition(":")
        self.delay_s = delay_s
        self.num_accepted = 0
        self._target = host, int(port)
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: set[_Ends] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()
        self._open = {direction: asyncio.Event() for direction in Direction}
        self.heal()
        self._server = self._ask(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self, *directions: Direction) -> None:
        """Hold back what goes in ``directions`` (both where none is given), also on new connections."""
        self._do(lambda: [self._open[direction].clear() for direction in directions or BOTH])

    def heal(self, *directions: Direction) -> None:
        """Let pass what was held back, and what comes."""
        self._do(lambda: [self._open[direction].set() for direction in directions or BOTH])

    def kill(self) -> int:
        """Reset every connection, with all that is held of it; return how many there were."""
        killed: list[int] = []
        self._do(lambda: killed.append(self._kill()))
        return killed[0]

    def close(self) -> None:
        """End everything that the proxy is."""
        if self._thread.is_alive():
            self._ask(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(LIMIT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def _ask(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(LIMIT_S)

    def _do(self, step: Callable[[], object]) -> None:
        async def carry_out() -> None:
            step()

        self._ask(carry_out())

    def _kill(self) -> int:
        killed = [ends for ends in self._connections if not ends.killed]
        for ends in killed:
            ends.kill()
        return len(killed)

    async def _close(self) -> None:
        # A server that is closed while it accepts would forget the connection, open.
        self._loop.remove_reader(self._server.sockets[0].fileno())
        await _settle()
        self._server.close()
        self._kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        await _settle()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.num_accepted += 1
        try:
            await self._join(reader, writer)
        except (OSError, asyncio.CancelledError):
            # The target is not there, a connection was reset, or the proxy ends.
            writer.transport.abort()
        finally:
            self._tasks.discard(task)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = _Ends(writer)
        self._connections.add(ends)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            ends.add(far_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(Direction.OUT, reader, far_writer))
                group.create_task(self._pump(Direction.BACK, far_reader, writer))
        except ExceptionGroup as errors:
            raise OSError(str(errors)) from errors
        finally:
            self._connections.discard(ends)
            for each in ends.writers:
                each.close()
                with contextlib.suppress(OSError):
                    await each.wait_closed()

    async def _pump(self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(HELD_CHUNKS)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write(direction, chunks, writer))
            while True:
                chunk = await reader.read(CHUNK_BYTES)
                await chunks.put((self._loop.time() + self.delay_s, chunk))
                if not chunk:
                    return

    async def _write(
        self, direction: Direction, chunks: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            due_s, chunk = await chunks.get()
            await asyncio.sleep(due_s - self._loop.time())
            await self._open[direction].wait()
            if not chunk:
                writer.write_eof()
                return
            writer.write(chunk)
            await writer.drain()


async def _settle() -> None:
    """What has just been accepted becomes a task, and what has been aborted closes its socket, some turns later."""
    for _ in range(10):
        await asyncio.sleep(0)
