"""Every exception that Danaus raises for something that happened, rather than for a bad argument.

    DanausError
    ├── ActorError            an endpoint raised; the actor lives on
    │   └── MessageError      a message could not be pickled or loaded; only its call fails
    ├── SupervisionError      the actor or its process is gone; ``failure`` tells how
    │   └── StoppedError      it was stopped on purpose
    ├── CallTimeoutError      no reply within the limit (also a TimeoutError)
    ├── CallCancelledError    the call was cancelled (also a concurrent.futures.CancelledError)
    ├── DeadlockError         the call closed a cycle of actors that wait for each other
    ├── MailboxFull           a receiver's mailbox is full and the caller may not wait
    ├── SpawnError            processes could not be started
    │   └── AdmissionError    more were asked for than the host's limits allow (also a ValueError)
    └── GroupBroken           a process group's generation has ended

Bad arguments get the built-in TypeError, ValueError, IndexError and LookupError at the call that brought them.
All of these can be pickled, and keep their fields as attributes.
"""

from __future__ import annotations

import traceback
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .failure import MeshFailure
    from .supervision.waits import Wait


class DanausError(Exception):
    """Root of the tree."""


class ActorError(DanausError):
    """An endpoint raised an exception; the actor lives on.

    Attributes:
        where: Actor, rank and endpoint, as text.
        exception: What was raised, or None where it could not be carried over.
        remote_traceback: The traceback as the remote process formatted it.
    """

    def __init__(self, where: str, exception: BaseException | None, remote_traceback: str) -> None:
        super().__init__(where, exception, remote_traceback)
        self.where, self.exception, self.remote_traceback = where, exception, remote_traceback
        self.__cause__ = exception

    def __str__(self) -> str:
        if self.exception is not None:
            # A message of several lines, and a group's tree, do not end with what was raised.
            last = traceback.format_exception_only(self.exception)[0].strip()
        else:
            last = self.remote_traceback.strip().rsplit("\n", 1)[-1]
        return f"{self.where} raised {last}\n\nRemote traceback:\n{self.remote_traceback.rstrip()}"


class MessageError(ActorError):
    """A message could not be pickled here or loaded there; only its call fails."""

    def __str__(self) -> str:
        reason = self.remote_traceback.strip()
        return f"{self.where}: {reason}"


class SupervisionError(DanausError):
    """A call's target is gone: its process died, or the actor failed.

    Attributes:
        failure: What happened, to which rank of which mesh, with the last lines it wrote.
        endpoint: The call that failed by it, as text, or None.
    """

    def __init__(self, failure: MeshFailure, endpoint: str | None = None) -> None:
        super().__init__(failure, endpoint)
        self.failure, self.endpoint = failure, endpoint

    def __str__(self) -> str:
        call = f"{self.endpoint}: " if self.endpoint else ""
        advice = "its policy starts it again: call again, or use options(retries=...) on an idempotent endpoint"
        return f"{call}{self.failure}" + (f"\n{advice}" if self.failure.restarts else "")


class StoppedError(SupervisionError):
    """The target has already been stopped."""


class CallTimeoutError(DanausError, TimeoutError):
    """A call's time limit passed before every rank had replied."""

    def __init__(self, endpoint: str, timeout_s: float, missing: tuple[str, ...]) -> None:
        super().__init__(endpoint, timeout_s, missing)
        self.endpoint, self.timeout_s, self.missing = endpoint, timeout_s, missing

    def __reduce__(self) -> tuple[Any, ...]:
        # TimeoutError is an OSError, which keeps two arguments only.
        return CallTimeoutError, (self.endpoint, self.timeout_s, self.missing), self.__dict__

    def __str__(self) -> str:
        shown = ", ".join(self.missing[:8]) + (f" and {len(self.missing) - 8} more" if len(self.missing) > 8 else "")
        return (
            f"{self.endpoint}: no reply within {self.timeout_s:g} s from {shown or 'any rank'}; the call was cancelled "
            "(a sync endpoint runs on): raise the timeout, or look at what they do"
        )


class CallCancelledError(DanausError, CancelledError):
    """The call was cancelled by its caller."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.endpoint = endpoint

    def __str__(self) -> str:
        return f"{self.endpoint}: the call was cancelled"


class DeadlockError(DanausError):
    """Actors waited for each other in a circle; this call, the youngest of it, was called off so that the others go on.

    Attributes:
        endpoint: The call.
        cycle: Who waits, each for the next and the last, which this call belongs to, for the first.
        at_s: ``time.time()`` at which it was called off.
    """

    def __init__(self, endpoint: str, cycle: tuple[Wait, ...], at_s: float) -> None:
        super().__init__(endpoint, cycle, at_s)
        self.endpoint, self.cycle, self.at_s = endpoint, cycle, at_s

    def __str__(self) -> str:
        lines = [
            f"  {wait.who} in {wait.endpoint} (host {wait.host}, pid {wait.pid}) waits for {wait.awaited} on "
            f"{following.who}, for {self.at_s - wait.since_s:.2f} s now"
            for wait, following in zip(self.cycle, (*self.cycle[1:], *self.cycle[:1]), strict=True)
        ]
        cycle = "\n".join(lines)
        return (
            f"{self.endpoint}: no answer can come, since actors wait for each other in a circle of {len(lines)}; "
            f"the youngest of their calls, the last below, was called off:\n{cycle}\n"
            "An actor answers nothing while its endpoint waits: await in an async @concurrent_endpoint, or pass on "
            "what is needed instead of calling back an actor that waits"
        )


class MailboxFull(DanausError):  # noqa: N818  names a state
    """The receiver's mailbox has no room, and code on an event loop may not block for it."""

    def __init__(self, target: str, bound: int) -> None:
        super().__init__(target, bound)
        self.target, self.bound = target, bound

    def __str__(self) -> str:
        return (
            f"{self.target}: its mailbox of {self.bound} messages is full; "
            "await the calls already made, use `await endpoint.call(...)`, or spawn with a larger mailbox="
        )


class SpawnError(DanausError):
    """Processes could not be started."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class AdmissionError(SpawnError, ValueError):
    """More processes were asked for than the host's limits allow; none was started.

    Attributes:
        num_procs: How many were asked for.
        max_procs: How many would fit.
        reason: The arithmetic of each limit that was exceeded.
    """

    def __init__(self, num_procs: int, max_procs: int, reason: str) -> None:
        super().__init__(reason)
        self.num_procs, self.max_procs = num_procs, max_procs

    def __reduce__(self) -> tuple[Any, ...]:
        return AdmissionError, (self.num_procs, self.max_procs, self.reason), self.__dict__


class GroupBroken(DanausError):  # noqa: N818  names a state
    """A process group was used after its generation had ended."""

    def __init__(self, dims: tuple[str, ...], old: int, new: int, reason: str = "") -> None:
        super().__init__(dims, old, new, reason)
        self.dims, self.old, self.new, self.reason = dims, old, new, reason

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return (
            f"process group over {self.dims}: generation {self.old} has ended{why}, {self.new} is the next; ask for "
            "the group again to join it"
        )
