"""Where measures run: keeps meshes between them, takes samples in turns, and collects results."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from .rows import UNITS, Result, Row
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


KIB, MIB = 1 << 10, 1 << 20
FULL = Effort(
    name="full",
    rounds=10,
    calls=200,
    flight=10_000,
    starts=5,
    deaths=100,
    sizes=(KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB),
)
QUICK = Effort(
    name="quick", rounds=3, calls=100, flight=10_000, starts=1, deaths=5, sizes=(KIB, MIB, 64 * MIB)
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
    def fresh_group(self, num_procs: int, *, torch: bool = False) -> Iterator[Group]:
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

    def record(  # noqa: PLR0913  the columns of a row
        self,
        row: Row,
        samples: Sequence[float],
        *,
        limit: Sequence[float] = (),
        base: Sequence[float] = (),
        **beside: Sequence[float],
    ) -> None:
        """Keep the samples of a row, given in seconds, per second or MiB. ``beside`` is labelled by its keywords."""
        scale = UNITS[row.unit]
        self.results[row.name] = Result(
            samples=[each * scale for each in samples],
            limit=[each * scale for each in limit],
            base=[each * scale for each in base],
            beside={label.replace("_", " "): [each * scale for each in values] for label, values in beside.items()},
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


def in_turns(rounds: int, *blocks: Callable[[], Iterable[float]]) -> list[list[float]]:
    """Run every block once, then all again, ``rounds`` times; return the samples of each block.

    What else the machine does meanwhile hits all blocks alike. The first round warms up and is dropped.
    """
    samples: list[list[float]] = [[] for _ in blocks]
    for number in range(rounds + 1):
        for block, kept in zip(blocks, samples, strict=True):
            taken = block()
            if number:
                kept.extend(taken)
    return samples

