"""Threads that carry out transfers: started when needed, gone when there was nothing to do for a moment."""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_THREADS: Final = 16
_IDLE_S: Final = 0.5


class Workers:
    """A pool of threads; every method may be called from any thread."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._num_threads = self._num_due = 0

    def run(self, task: Callable[[], None]) -> None:
        """Have a thread run ``task``, which must not raise."""
        with self._lock:
            self._num_due += 1
            needs_thread = self._num_due > self._num_threads and self._num_threads < MAX_THREADS
            self._num_threads += needs_thread
            # Within the lock: else the last thread might leave between the count and the task.
            self._tasks.put(task)
        if needs_thread:
            threading.Thread(target=self._work, name="danaus-bulk", daemon=True).start()

    def _work(self) -> None:
        while True:
            try:
                task = self._tasks.get(timeout=_IDLE_S)
            except Empty:
                with self._lock:
                    if self._tasks.empty():
                        self._num_threads -= 1
                        return
                continue
            try:
                task()
            finally:
                with self._lock:
                    self._num_due -= 1
            # While the thread waits, nothing keeps the transfer's memory.
            del task
