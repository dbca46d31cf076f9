"""A proc mesh with the benchmark's actors, in a runtime that has meshes, slices and adverbs: Danaus and Monarch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .subject import WAIT_S, AbsentError

if TYPE_CHECKING:
    from collections.abc import Callable


class MeshGroup:
    """Procs along dimension ``p``, with one or more meshes of ``probe`` actors on them."""

    def __init__(
        self,
        procs: Any,
        *,
        probe: type,
        async_probe: type,
        actors: int,
        death: type[Exception] | tuple[type[Exception], ...],
    ) -> None:
        self._procs, self._probe, self._async_probe, self._death = procs, probe, async_probe, death
        self._probes = [procs.spawn(f"probes{number}", probe) for number in range(actors)]
        self._all = self._probes[0]
        self._first = self._all.slice(p=0)
        self._async: Any = None
        self._pids: list[int] = []
        self._num_neighbours = 0

    def pids(self) -> list[int]:
        # Kept: a rank that hangs or is dead could not answer.
        self._pids = self._pids or list(self._all.pid.call().get(timeout=WAIT_S).values())
        return self._pids

    def call_one(self) -> None:
        self._first.noop.call_one().get(timeout=WAIT_S)

    def call_one_async(self) -> None:
        if self._async is None:
            self._async = self._procs.slice(p=0).spawn("async", self._async_probe)
        self._async.noop_async.call_one().get(timeout=WAIT_S)

    def call_all(self) -> None:
        for future in [probes.noop.call() for probes in self._probes]:
            future.get(timeout=WAIT_S)

    def relay(self, count: int) -> list[float]:
        return self._first.relay.call_one(self._all.slice(p=1), count).get(timeout=WAIT_S)

    def call_many(self, count: int) -> None:
        for future in [self._first.noop.call_one() for _ in range(count)]:
            future.get(timeout=WAIT_S)

    def broadcast_many(self, count: int) -> None:
        before = self._first.ticks.call_one().get(timeout=WAIT_S)
        for _ in range(count):
            self._first.tick.broadcast()
        after = self._first.ticks.call_one().get(timeout=WAIT_S)
        if after - before != count:
            raise RuntimeError(f"{count} broadcasts sent, {after - before} handled")

    def pass_argument(self, payload: Any) -> None:
        self._first.ignore.call_one(payload).get(timeout=WAIT_S)

    def sum_argument(self, payload: Any, *, borrow: bool) -> int:
        if borrow and not hasattr(self._probe, "borrowed_total"):
            raise AbsentError("arguments cannot be borrowed")
        total = self._first.borrowed_total if borrow else self._first.total
        return total.call_one(payload).get(timeout=WAIT_S)

    def sum_times(self, kind: str, size_bytes: int, count: int) -> list[float]:
        return self._first.sum_times.call_one(kind, size_bytes, count).get(timeout=WAIT_S)

    def fetch(self, kind: str, size_bytes: int) -> Any:
        return self._first.produce.call_one(kind, size_bytes).get(timeout=WAIT_S)

    def hang(self, rank: int) -> Callable[[], None]:
        future = self._all.slice(p=rank).hang.call_one()

        def wait_failed() -> None:
            try:
                future.get(timeout=WAIT_S)
            except self._death:
                return
            raise RuntimeError("a call to a killed process returned")

        return wait_failed

    def spin_neighbour(self, seconds: float) -> Callable[[], None]:
        self._num_neighbours += 1
        neighbour = self._procs.slice(p=0).spawn(f"neighbour{self._num_neighbours}", self._probe)
        neighbour.noop.call_one().get(timeout=WAIT_S)
        spinning = neighbour.spin.call_one(seconds)

        def wait_ended() -> None:
            spinning.get(timeout=WAIT_S)
            neighbour.stop().get(timeout=WAIT_S)

        return wait_ended

    def stop(self) -> None:
        self._procs.stop().get(timeout=WAIT_S)
