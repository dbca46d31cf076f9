"""The agents of a daemon as processes: starts them as its table says, and tells the table what becomes of them."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from .job_process import JobProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .daemon_jobs import Command, JobTable, Key, Start
    from .daemon_protocol import Attach
    from .job_process import StartChild

_log = logging.getLogger("danaus.daemon")


class JobProcesses:
    """Children of the daemon.

    Args:
        table: Decides.
        start_child: Starts a process.
        settings: What an agent is told, given the request for it.
        carry_out: Takes the table's commands.
        watch: Has a descriptor polled.
        unwatch: Ends that.
    """

    def __init__(
        self,
        table: JobTable,
        start_child: StartChild,
        settings: Callable[[Attach], dict[str, Any]],
        *,
        carry_out: Callable[[Iterable[Command]], object],
        watch: Callable[[int, Callable[[], object]], object],
        unwatch: Callable[[int], object],
    ) -> None:
        self._table, self._start_child, self._settings = table, start_child, settings
        self._carry_out, self._watch, self._unwatch = carry_out, watch, unwatch
        self._children: dict[Key, JobProcess] = {}
        self._reaps_orphans = False

    def start(self, command: Start) -> None:
        """Start an agent."""
        key, attach = command.key, command.attach
        try:
            child = JobProcess(self._start_child(attach.env), self._settings(attach))
        except OSError as error:
            reason = f"its agent could not be started: {error.strerror}"
            self._carry_out(self._table.on_not_started(key, reason, now_s=time.monotonic()))
            return
        self._children[key] = child
        self._watch(child.pidfd, lambda: self._on_exit(key))
        self._watch(child.answer_fd, lambda: self._on_answer(key))
        _log.info("job %s, slot %d: agent is process %d", key.job, key.slot, child.pid)

    def send_signal(self, key: Key, signum: int) -> None:
        """Send a signal to an agent, if it still lives."""
        child = self._children.get(key)
        if child is not None:
            child.send_signal(signum)

    def _on_answer(self, key: Key) -> None:
        child = self._children[key]
        try:
            answer = child.read_answer()
        except ValueError as error:
            self._stop_reading(child)
            self._carry_out(self._table.on_wrong(key, str(error), now_s=time.monotonic()))
            return
        if child.has_said_all:
            self._stop_reading(child)
        if answer is not None:
            self._carry_out(self._table.on_up(key, answer.endpoint, answer.pid))

    def _stop_reading(self, child: JobProcess) -> None:
        if child.answer_fd >= 0:
            self._unwatch(child.answer_fd)
            child.stop_reading()

    def _on_exit(self, key: Key) -> None:
        child = self._children[key]
        # An event of a descriptor that has been closed meanwhile, and whose number this child's has now.
        if not child.has_ended():
            return
        if child.answer_fd >= 0:
            # What it said before counts.
            self._on_answer(key)
        self._stop_reading(child)
        self._unwatch(child.pidfd)
        del self._children[key]
        code = child.reap()
        _log.info("job %s, slot %d: agent has ended with code %d", key.job, key.slot, code)
        self._carry_out(self._table.on_exit(key, code, now_s=time.monotonic()))
        self.reap_orphans()

    def adopt(self) -> None:
        """Bury orphans from now on: this process is their next parent, and has no other children."""
        self._reaps_orphans = True

    def reap_orphans(self) -> None:
        """Bury what killed agents have left."""
        if not self._reaps_orphans:
            return
        ours = {child.pid for child in self._children.values()}
        with contextlib.suppress(ChildProcessError):
            while (status := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if status.si_pid in ours:
                    # Its pidfd tells, and then this is done again.
                    return
                os.waitpid(status.si_pid, 0)

    def close(self) -> None:
        """Kill those that are still there."""
        for child in self._children.values():
            child.kill()
            child.reap()
        self._children.clear()
