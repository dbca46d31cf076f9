"""Random faults that a seed determines."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from .faults import Fault, FaultKind, Where

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

ALL_KINDS = tuple(FaultKind)


class InjectedError(RuntimeError):
    """What a random fault raises."""


class Chaos:
    """An endless schedule of random faults; the same arguments give the same faults, in the same order.

    >>> from danaus import testing
    >>> chaos = testing.Chaos(7, ranks=4, endpoints=("step",), kinds=("kill", "slow"))
    >>> faults = chaos.take(3)
    >>> faults == testing.Chaos(7, ranks=4, endpoints=("step",), kinds=("kill", "slow")).take(3)
    True

    ``print(chaos)`` shows the seed and what was taken so far.

    Args:
        seed: Any whole number; print it, to repeat the run.
        ranks: Number of ranks of the mesh that is to be struck.
        kinds: Kinds to choose from, or a weight for each.
        endpoints: Endpoints to strike at.
        points: Points to strike at, see :func:`point`. With neither, any endpoint counts.
        max_nth: How late a fault strikes: ``nth`` is from 1 to this.
        max_s: How long a stop, a hang or a delay lasts at most, in seconds.
        incarnation: As in :class:`Where`.

    Raises:
        ValueError: A kind is unknown, or a number is below 1.
    """

    def __init__(
        self,
        seed: int,
        *,
        ranks: int,
        kinds: Iterable[str] | Mapping[str, float] = ALL_KINDS,
        endpoints: Sequence[str] = (),
        points: Sequence[str] = (),
        max_nth: int = 10,
        max_s: float = 0.5,
        incarnation: int | Literal["current", "every"] = "current",
    ) -> None:
        weights = dict(kinds) if isinstance(kinds, Mapping) else dict.fromkeys(kinds, 1.0)
        unknown = [kind for kind in weights if kind not in ALL_KINDS]
        if unknown or not weights:
            raise ValueError(f"Chaos: kinds={list(weights)}: expected some of {', '.join(ALL_KINDS)}")
        if ranks < 1 or max_nth < 1 or not max_s > 0:
            raise ValueError(f"Chaos: ranks={ranks}, max_nth={max_nth}, max_s={max_s:g}: each has to be above 0")
        self.seed = seed
        self.taken: list[Fault] = []
        self._random = random.Random(seed)  # noqa: S311  nobody has to be unable to guess it
        self._kinds = [FaultKind(kind) for kind in weights]
        self._weights = list(weights.values())
        places: list[Where] = [{"endpoint": name} for name in endpoints]
        self._places = places + [Where(point=name) for name in points] or [Where()]
        self._ranks, self._max_nth, self._max_s = ranks, max_nth, max_s
        self._incarnation: int | Literal["current", "every"] = incarnation

    def __iter__(self) -> Iterator[Fault]:
        return self

    def __next__(self) -> Fault:
        choose = self._random
        kind = choose.choices(self._kinds, self._weights)[0]
        where: Where = choose.choice(self._places).copy()
        where["incarnation"] = self._incarnation
        where["rank"], where["nth"] = choose.randrange(self._ranks), choose.randint(1, self._max_nth)
        if choose.random() < 0.5 and "point" not in where:
            where["when"] = "after"
        code, seconds = choose.randint(1, 99), round(choose.uniform(0.1, 1.0) * self._max_s, 3)
        fault = Fault(
            kind=kind,
            code=code if kind is FaultKind.EXIT else 1,
            exception=_error_of(kind, self.seed, len(self.taken)),
            seconds=seconds if kind in {FaultKind.STOP, FaultKind.HANG, FaultKind.SLOW} else None,
            **where,
        )
        self.taken.append(fault)
        return fault

    def take(self, count: int) -> list[Fault]:
        """Return the next ``count`` faults."""
        return [next(self) for _ in range(count)]

    def __str__(self) -> str:
        lines = [f"  {number}: {fault}" for number, fault in enumerate(self.taken, 1)]
        return "\n".join([f"Chaos(seed={self.seed}), {len(self.taken)} faults:", *lines])


def _error_of(kind: FaultKind, seed: int, number: int) -> InjectedError | None:
    return InjectedError(f"fault {number + 1} of seed {seed}") if kind is FaultKind.RAISE else None
