"""Where measures run: keeps meshes between them, takes samples in turns, and collects results."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .rows import UNITS, Result, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

    from .subject import Group, Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much to measure."""

    name: str
    rounds: int
    """Blocks of each kind, taken in turns."""
    calls: int
    """Round trips in a block."""
    flight: int
    """Calls in flight, and broadcasts, in a block."""
    starts: int
    """Scripts started for each row."""
    deaths: int
    """Processes killed for each row."""
    sizes: tuple[int, ...]
    """Payloads, bytes."""
    thorough: bool
    """Warm up what takes seconds, too, and measure the limits that no goal refers to."""


KIB, MIB = 1 << 10, 1 << 20
BUDGET_S: Final = 60.0
"""How long a slow runtime may take over one row."""
FULL = Effort(
    name="full",
    rounds=10,
    calls=200,
    flight=10_000,
    starts=5,
    deaths=100,
    sizes=(KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB),
    thorough=True,
)
QUICK = Effort(
    name="quick", rounds=3, calls=100, flight=10_000, starts=1, deaths=5, sizes=(KIB, MIB, 64 * MIB), thorough=False
)


class Lab:
    """The runtime under test with its meshes, and the results so far."""

    def __init__(self, subject: Subject, effort: Effort, *, say: Callable[[str], None]) -> None:
        self.subject, self.effort = subject, effort
        self.say = say
        self.results: dict[str, Result] = {}
        self._groups: dict[tuple[int, bool, int], Group] = {}

    def group(self, num_procs: int, *, torch: bool = False, actors: int = 1) -> Group:
        """Return a mesh that is up and shared by the measures; they leave it as they found it."""
        key = (num_procs, torch, actors)
        if key not in self._groups:
            self.say(f"starting {num_procs} procs")
            group = self.subject.spawn(num_procs, torch=torch, actors=actors)
            self._groups[key] = group
            group.call_all()
        return self._groups[key]

    @contextlib.contextmanager
    def fresh_group(self, num_procs: int, *, torch: bool = False) -> Generator[Group]:
        """Start a mesh for one use; stops it at the end unless that has been done."""
        group = self.subject.spawn(num_procs, torch=torch)
        try:
            group.call_all()
            yield group
        finally:
            group.stop()

    def clear(self) -> None:
        """Stop the shared meshes."""
        while self._groups:
            _key, group = self._groups.popitem()
            group.stop()

    def forget(self) -> None:
        """Stop the shared meshes, as far as they still can be, after something went wrong."""
        while self._groups:
            _key, group = self._groups.popitem()
            with contextlib.suppress(Exception):
                group.stop()

    def record(
        self,
        row: Row,
        samples: Sequence[float],
        *,
        limit: Sequence[float] = (),
        base: Sequence[float] = (),
        beside: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Keep the samples of a row, given in seconds, per second or MiB."""
        scale = UNITS[row.unit]
        self.results[row.name] = Result(
            samples=[each * scale for each in samples],
            limit=[each * scale for each in limit],
            base=[each * scale for each in base],
            beside={label: [each * scale for each in values] for label, values in (beside or {}).items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Rows that are measured together, and how. What it yields of its rows it records in the lab."""

    name: str
    rows: tuple[Row, ...]
    run: Callable[[Lab], None]
    only_large: bool = False


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def times(work: Callable[[], object], count: int) -> list[float]:
    """Return the seconds of each of ``count`` repetitions."""
    return [timed(work) for _ in range(count)]


def in_turns(rounds: int, *blocks: Callable[[], Iterable[float]], warm_up: bool = True) -> list[list[float]]:
    """Run every block once, then all again, ``rounds`` times; return the samples of each block.

    What else the machine does meanwhile hits all blocks alike. With ``warm_up`` a first round more is run and dropped.
    No round starts after ``BUDGET_S``.
    """
    samples: list[list[float]] = [[] for _ in blocks]
    end = time.perf_counter() + BUDGET_S
    for number in range(-1 if warm_up else 0, rounds):
        for block, kept in zip(blocks, samples, strict=True):
            taken = block()
            if number >= 0:
                kept.extend(taken)
        if number >= 0 and time.perf_counter() > end:
            break
    return samples
