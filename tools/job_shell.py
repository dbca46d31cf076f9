"""`danaus job shell`: a terminal on a host of a job, through the host's daemon."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import threading
import tty
from typing import TYPE_CHECKING, Any

from .. import Channel
from ..runtime.errors import ActorError, SupervisionError
from ..runtime.jobs.remote import Terminal
from .job_remote import LOST, POLL_S, Shown, actors_on, attached, first_line

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from ..runtime.calls.future import Future
    from ..runtime.calls.port import PortReceiver
    from ..runtime.jobs import Job


def open_shell(job: Job[Any], host: int, command: Sequence[str], *, timeout_s: float) -> int:
    """Have a terminal on a host until its shell ends; return the shell's exit code."""
    with attached(job, [host], timeout_s=timeout_s) as (mesh, _), actors_on(mesh, Terminal) as actor:
        port, receiver = Channel[Any].open()
        term = os.environ.get("TERM", "xterm")
        call = actor.run.call_one(list(command), _terminal_size(), term, port)
        with _raw_terminal(actor):
            typing = threading.Thread(target=_send_typed, args=(actor, call), name="danaus-job-typed", daemon=True)
            typing.start()
            _show_terminal(receiver, call, host, Shown({host: actor}))
            # It sees that the call has ended.
            typing.join()
        try:
            return int(call.get())
        except (SupervisionError, ActorError) as error:
            print(f"danaus job shell: host {host}: {first_line(error)}", file=sys.stderr)
            return LOST


def _show_terminal(receiver: PortReceiver[Any], call: Future[Any], host: int, shown: Shown) -> None:
    while True:
        waiting = receiver.recv()
        while not waiting.done():
            if call.done() and call.exception() is not None:
                return
            with contextlib.suppress(TimeoutError):
                waiting.exception(timeout=POLL_S)
        data = waiting.get()
        if data is None:
            return
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        shown.note(host)


def _send_typed(actor: Any, call: Future[Any]) -> None:
    """Send what is typed until the call has ended (a thread of its own)."""
    stdin = sys.stdin.fileno()
    while not call.done():
        if not select.select([stdin], [], [], POLL_S)[0]:
            continue
        data = os.read(stdin, 4096)
        # End of a file that is given instead of a terminal: what Ctrl-D sends.
        actor.write.broadcast(data or b"\x04")
        if not data:
            return


@contextlib.contextmanager
def _raw_terminal(actor: Any) -> Generator[None]:
    """Hand every key on, Ctrl-C too, and changes of the window's size; a file instead of a terminal stays as it is."""
    stdin = sys.stdin.fileno()
    if not os.isatty(stdin):
        yield
        return
    before = termios.tcgetattr(stdin)
    handler = signal.signal(signal.SIGWINCH, lambda *_: actor.resize.broadcast(_terminal_size()))
    try:
        tty.setraw(stdin)
        yield
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, handler)


def _terminal_size() -> tuple[int, int]:
    """Rows and columns."""
    with contextlib.suppress(OSError):
        columns, rows = os.get_terminal_size(sys.stdout.fileno())
        return rows, columns
    return 24, 80
