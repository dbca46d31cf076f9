"""Ray, as the benchmark drives it: one actor per process, no meshes, no broadcast."""

# Seldom installed where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any, Final

import ray
from ray.exceptions import RayActorError

from .. import acts
from ..placement import descendants
from ..subject import WAIT_S, AbsentError, Group, TorchUse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SCRIPT: Final = """\
import time
{script_imports}
import ray

@ray.remote(num_cpus=0)
class Probe:
    def ping(self):
        {worker_imports}
        return 1

if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False)
    probes = [Probe.remote() for _ in range({num_procs})]
    assert sum(ray.get([probe.ping.remote() for probe in probes], timeout={limit})) == {num_procs}
    print(time.monotonic(), flush=True)
    ray.shutdown()
"""


class Probe:
    """Answers, sums and hangs on request."""

    noop = acts.noop
    pid = acts.pid
    ignore = acts.ignore
    total = acts.total
    sum_times = acts.sum_times
    produce = acts.produce
    hang = acts.hang

    def import_torch(self) -> None:
        """Import torch here."""
        import torch

        assert torch.__version__

    def relay(self, peer: Any, count: int) -> list[float]:
        """Call another actor from here; return the seconds of each call."""
        times: list[float] = []
        for _ in range(count):
            start = time.perf_counter()
            ray.get(peer.noop.remote(), timeout=10)
            times.append(time.perf_counter() - start)
        return times


class AsyncProbe:
    """The async method; it makes the whole actor one of Ray's async actors."""

    noop_async = acts.noop_async


class Ray:
    """Ray core."""

    name = "Ray"
    package = "ray"

    def open(self) -> None:
        """Start Ray's daemons."""
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)

    def close(self) -> None:
        """End them."""
        ray.shutdown()

    def spawn(self, num_procs: int, *, torch: bool = False, actors: int = 1) -> Group:
        """Start actors, each in a process of its own.

        Raises:
            AbsentError: More than one actor per process was asked for.
        """
        if actors > 1:
            raise AbsentError("an actor has its process for itself")
        return RayGroup(num_procs, torch=torch)

    def daemons(self, workers: Sequence[int]) -> dict[str, list[int]]:
        """Return all that runs beside the workers."""
        return {"agent": [pid for pid in descendants(os.getpid()) if pid not in workers]}

    def script(self, num_procs: int, torch: TorchUse) -> str:
        """Return a driver script."""
        return _SCRIPT.format(
            script_imports="import torch" if torch is TorchUse.EVERYBODY else "",
            worker_imports="pass" if torch is TorchUse.NOBODY else "import torch",
            num_procs=num_procs,
            limit=WAIT_S,
        )


class RayGroup:
    """A list of actors."""

    def __init__(self, num_procs: int, *, torch: bool) -> None:
        remote: Any = ray.remote(Probe)
        self._probes = [remote.options(num_cpus=0).remote() for _ in range(num_procs)]
        self._imports = [probe.import_torch.remote() for probe in self._probes] if torch else []
        self._async: Any = None
        self._pids: list[int] = []

    def pids(self) -> list[int]:
        self._pids = self._pids or _get([probe.pid.remote() for probe in self._probes])
        return self._pids

    def call_one(self) -> None:
        _get(self._probes[0].noop.remote())

    def call_one_async(self) -> None:
        if self._async is None:
            remote: Any = ray.remote(AsyncProbe)
            self._async = remote.options(num_cpus=0).remote()
        _get(self._async.noop_async.remote())

    def call_all(self) -> None:
        _get([probe.noop.remote() for probe in self._probes])

    def relay(self, count: int) -> list[float]:
        return _get(self._probes[0].relay.remote(self._probes[1], count))

    def call_many(self, count: int) -> None:
        _get([self._probes[0].noop.remote() for _ in range(count)])

    def broadcast_many(self, count: int) -> None:
        raise AbsentError(f"no broadcast, so not {count} of them: every call makes a reply")

    def pass_argument(self, payload: Any) -> None:
        _get(self._probes[0].ignore.remote(payload))

    def sum_argument(self, payload: Any, *, borrow: bool) -> int:
        if borrow:
            raise AbsentError("tensors cannot be borrowed")
        return _get(self._probes[0].total.remote(payload))

    def sum_times(self, kind: str, size_bytes: int, count: int) -> list[float]:
        return _get(self._probes[0].sum_times.remote(kind, size_bytes, count))

    def fetch(self, kind: str, size_bytes: int) -> Any:
        return _get(self._probes[0].produce.remote(kind, size_bytes))

    def hang(self, rank: int) -> Callable[[], None]:
        reference = self._probes[rank].hang.remote()

        def wait_failed() -> None:
            try:
                _get(reference)
            except RayActorError:
                return
            raise RuntimeError("a call to a killed process returned")

        return wait_failed

    def spin_neighbour(self, seconds: float) -> Callable[[], None]:
        raise AbsentError(f"no actor has a neighbour in its process that could spin for {seconds:g} s")

    def stop(self) -> None:
        pids = self.pids() if not self._pids else self._pids
        for probe in [*self._probes, *([] if self._async is None else [self._async])]:
            ray.kill(probe)
        end = time.monotonic() + WAIT_S
        while any(os.path.exists(f"/proc/{pid}") for pid in pids):
            if time.monotonic() > end:
                raise TimeoutError(f"Ray's workers outlived ray.kill by {WAIT_S:g} s")
            time.sleep(0.001)


def _get(references: Any) -> Any:
    return ray.get(references, timeout=WAIT_S)
