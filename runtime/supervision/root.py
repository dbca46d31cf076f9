"""The root of the tree, in the controller: prints each root cause once, and calls the hook for what nobody handled."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from .hook import call_hook, install
from .reports import RootCauses

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..failure import MeshFailure
    from ..log_printer import LogPrinter
    from ..proc import LocalProc


class Root:
    """What the controller adds to its supervisor."""

    def __init__(self, local: LocalProc, printer: LogPrinter) -> None:
        self._local, self._printer = local, printer
        self._causes = RootCauses()
        self._lock = threading.Lock()
        supervisor = local.supervisor
        supervisor.report = lambda failure: self._tell(lambda now_s: self._causes.on_failure(failure, now_s))
        supervisor.note = lambda failure, text: self._tell(lambda now_s: self._causes.on_note(failure, text, now_s))
        supervisor.repaired = lambda failure, again: self._tell(
            lambda now_s: self._causes.on_repair(failure, again, now_s)
        )
        supervisor.at_root = self._on_unhandled
        install()

    def close(self) -> None:
        """Print what still waits."""
        with self._lock:
            texts = self._causes.flush()
        self._print(texts)

    def _tell(self, event: Callable[[float], list[str]]) -> None:
        with self._lock:
            texts = event(time.monotonic())
            next_s = self._causes.next_check_s()
        self._print(texts)
        if next_s is not None:
            self._local.run_at(next_s, lambda: self._tell(self._causes.check))

    def _print(self, texts: list[str]) -> None:
        for text in texts:
            self._printer.note(f"danaus: {text}")

    def _on_unhandled(self, failure: MeshFailure) -> None:
        from ..calls.future import _run_apart

        self._local.supervisor.report(failure)
        self.close()
        _run_apart(lambda: call_hook(failure))
