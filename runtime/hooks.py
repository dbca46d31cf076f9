"""Calls the hooks of an actor that come in between its messages: ``__supervise__`` and ``__drain__``."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from .failure import MeshFailure


@dataclass(frozen=True, slots=True)
class Question:
    """A hook of the actor that the runtime calls.

    Attributes:
        hook: Its name.
        argument: What it is called with.
        answer: Gets whether it returned something true, or None where it raised (the actor's thread).
        cause: The failure that it is asked about; where it raises, the actor fails, and that is why.
    """

    hook: str
    argument: Any
    answer: Callable[[bool | None], None]
    cause: MeshFailure | None = None


class Hooks:
    """What one actor is to be asked; all but :meth:`ask` on the actor's thread.

    Args:
        on_raised: Called, after the answer, with a question and what its hook raised.
    """

    def __init__(self, on_raised: Callable[[Question, BaseException], None]) -> None:
        self.is_due: deque[Question] = deque()
        self._on_raised = on_raised
        self._tasks: set[asyncio.Future[Any]] = set()

    def ask(self, question: Question) -> None:
        """Have a hook called when :meth:`run` comes next (any thread)."""
        self.is_due.append(question)

    def run(self, actor: Any) -> None:
        """Call what is due; an async hook becomes a task where a loop runs."""
        while self.is_due:
            question = self.is_due.popleft()
            try:
                outcome = call(actor, question.hook, question.argument)
            except Exception as error:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
                question.answer(None)
                self._on_raised(question, error)
                continue
            if isinstance(outcome, asyncio.Future):
                self._tasks.add(outcome)
                outcome.add_done_callback(partial(self._on_done, question))
            else:
                question.answer(bool(outcome))

    def _on_done(self, question: Question, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            question.answer(not task.cancelled() and bool(task.result()))
        else:
            question.answer(None)
            self._on_raised(question, error)


def call(actor: Any, hook: str, argument: Any) -> Any:
    """Call a hook, sync or async; return its outcome, or the task that it is where this thread's loop runs."""
    outcome = getattr(actor, hook)(argument)
    if not asyncio.iscoroutine(outcome):
        return outcome
    if asyncio._get_running_loop() is not None:
        return asyncio.ensure_future(outcome)
    with asyncio.Runner() as runner:
        return runner.run(outcome)
