"""What the benchmark asks of a runtime. Danaus and its peers implement it, so that the same code measures them all."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WAIT_S: Final = 60.0
"""The longest that any single operation may take."""


class AbsentError(Exception):
    """The runtime under test has no such thing; the row says so instead of failing."""


class TorchUse(Enum):
    """Who imports torch in a script whose start is measured."""

    NOBODY = "nobody"
    WORKERS = "workers"
    EVERYBODY = "everybody"


class Group(Protocol):
    """Some procs with the benchmark's actors on each. Methods wait for what they started, unless they say otherwise."""

    def pids(self) -> list[int]:
        """Return the process of each rank."""
        ...

    def call_one(self) -> None:
        """Call a sync endpoint that does nothing on rank 0."""
        ...

    def call_one_async(self) -> None:
        """Call an async endpoint that does nothing on rank 0."""
        ...

    def call_all(self) -> None:
        """Call a sync endpoint that does nothing on every actor."""
        ...

    def relay(self, count: int) -> list[float]:
        """Let rank 0 call rank 1; return the seconds of each call, measured there."""
        ...

    def call_many(self, count: int) -> None:
        """Have ``count`` calls to rank 0 in flight, then wait for all."""
        ...

    def broadcast_many(self, count: int) -> None:
        """Broadcast ``count`` times to rank 0 and wait until all were handled."""
        ...

    def pass_argument(self, payload: Any) -> None:
        """Send ``payload`` to rank 0, which does not read it."""
        ...

    def sum_argument(self, payload: Any, *, borrow: bool) -> int:
        """Send ``payload`` to rank 0, which sums every byte."""
        ...

    def sum_times(self, kind: str, size_bytes: int, count: int) -> list[float]:
        """Return the seconds that rank 0 takes to sum a payload of its own, ``count`` times."""
        ...

    def fetch(self, kind: str, size_bytes: int) -> Any:
        """Return a payload that rank 0 holds ready."""
        ...

    def hang(self, rank: int) -> Callable[[], None]:
        """Start a call that never returns; the returned function waits until it fails."""
        ...

    def spin_neighbour(self, seconds: float) -> Callable[[], None]:
        """Let another actor in rank 0's process run Python code; the returned function waits for its end."""
        ...

    def stop(self) -> None:
        """End the processes and wait until they are gone."""
        ...


class Subject(Protocol):
    """A runtime under test."""

    name: str
    package: str

    def open(self) -> None:
        """Make the runtime ready to spawn."""
        ...

    def close(self) -> None:
        """End everything the runtime started."""
        ...

    def spawn(self, num_procs: int, *, torch: bool = False, actors: int = 1) -> Group:
        """Start ``num_procs`` procs with ``actors`` actors on each; does not wait for them."""
        ...

    def daemons(self, workers: Sequence[int]) -> dict[str, list[int]]:
        """Return the processes that the runtime keeps beside its workers: its ``agent``, its ``zygote``, if any."""
        ...

    def script(self, num_procs: int, torch: TorchUse) -> str:
        """Return a script that prints ``time.monotonic()`` once each of its procs has replied, then ends cleanly."""
        ...
