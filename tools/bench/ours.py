"""Danaus, as the benchmark drives it: through the public interface only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from ...runtime import ProcMesh, SupervisionError, shutdown_context, this_host
from .placement import descendants, parent_of
from .probe import AsyncProbe, Probe
from .subject import WAIT_S, Group, TorchUse

_SCRIPT: Final = """\
import time
{script_imports}
from danaus import Actor, endpoint, this_host

class Probe(Actor):
    @endpoint
    def ping(self):
        {worker_imports}
        return 1

if __name__ == "__main__":
    with this_host().spawn_procs(per_host={{"p": {num_procs}}}, preload={preload}) as procs:
        replies = procs.spawn("probes", Probe).ping.call().get(timeout={limit})
        assert sum(replies.values()) == {num_procs}
        print(time.monotonic(), flush=True)
"""


class Danaus:
    """The runtime of this package."""

    name = "Danaus"
    package = "danaus"

    def open(self) -> None:
        """Nothing to do: the first spawn starts what it needs."""

    def close(self) -> None:
        """End the host agent and every process."""
        shutdown_context().get(timeout=WAIT_S)

    def spawn(self, num_procs: int, *, torch: bool = False, actors: int = 1) -> Group:
        """Start procs, with torch preloaded or with nothing preloaded."""
        preload = ("torch",) if torch else ()
        procs = this_host().spawn_procs(per_host={"p": num_procs}, name="bench", preload=preload)
        return DanausGroup(procs, actors)

    def daemons(self, workers: Sequence[int]) -> dict[str, int]:
        """Return the host agent (the parent of the workers) and the largest zygote below it."""
        agent = parent_of(workers[0])
        zygotes = [pid for pid in descendants(agent) if pid not in workers]
        largest = max(zygotes, key=_resident, default=0)
        return {"agent": agent, "zygote": largest} if largest else {"agent": agent}

    def script(self, num_procs: int, torch: TorchUse) -> str:
        """Return a controller script; with torch, its endpoint asks for it."""
        return _SCRIPT.format(
            script_imports="import torch" if torch is TorchUse.EVERYBODY else "",
            worker_imports="pass" if torch is TorchUse.NOBODY else "import torch",
            preload={TorchUse.NOBODY: "()", TorchUse.WORKERS: "('torch',)", TorchUse.EVERYBODY: "None"}[torch],
            num_procs=num_procs,
            limit=WAIT_S,
        )


class DanausGroup:
    """A proc mesh with the benchmark's actors."""

    def __init__(self, procs: ProcMesh, actors: int) -> None:
        self._procs = procs
        self._probes = [procs.spawn(f"probes{number}", Probe) for number in range(actors)]
        self._all = self._probes[0]
        self._first = self._all.slice(p=0)
        self._async: Any = None
        self._pids: list[int] = []

    def pids(self) -> list[int]:
        # Kept: a rank that hangs or is dead could not answer.
        self._pids = self._pids or list(self._all.pid.call().get(timeout=WAIT_S).values())
        return self._pids

    def call_one(self) -> None:
        self._first.noop.call_one().get(timeout=WAIT_S)

    def call_one_async(self) -> None:
        if self._async is None:
            self._async = self._procs.slice(p=0).spawn("async", AsyncProbe)
        self._async.noop.call_one().get(timeout=WAIT_S)

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
            except SupervisionError:
                return
            raise RuntimeError("a call to a killed process returned")

        return wait_failed

    def spin_neighbour(self, seconds: float) -> Callable[[], None]:
        neighbour: Any = self._procs.slice(p=0).spawn("neighbour", Probe)
        neighbour.noop.call_one().get(timeout=WAIT_S)
        spinning = neighbour.spin.call_one(seconds)

        def wait_ended() -> None:
            spinning.get(timeout=WAIT_S)
            neighbour.stop().get(timeout=WAIT_S)

        return wait_ended

    def stop(self) -> None:
        self._procs.stop(timeout=WAIT_S).get(timeout=WAIT_S)


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as statm:
            return int(statm.read().split()[1])
    except OSError:
        return 0


