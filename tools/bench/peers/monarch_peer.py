"""Monarch, as the benchmark drives it."""

# Seldom installed where types are checked.
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import monarch.actor as monarch_actor
from monarch._rust_bindings.monarch_hyperactor.supervision import SupervisionError
from monarch.actor import Actor, ActorError, endpoint, shutdown_context, this_host

from .. import acts
from ..mesh_group import MeshGroup
from ..subject import WAIT_S, Group, TorchUse

if TYPE_CHECKING:
    from collections.abc import Sequence

_SCRIPT: Final = """\
import time
{script_imports}
from monarch.actor import Actor, endpoint, shutdown_context, this_host

class Probe(Actor):
    @endpoint
    def ping(self):
        {worker_imports}
        return 1

if __name__ == "__main__":
    procs = this_host().spawn_procs(per_host={{"p": {num_procs}}})
    replies = procs.spawn("probes", Probe).ping.call().get(timeout={limit})
    assert sum(replies.values()) == {num_procs}
    print(time.monotonic(), flush=True)
    procs.stop().get(timeout={limit})
    shutdown_context().get(timeout={limit})
"""


class Probe(Actor):
    """Answers, counts, sums and hangs on request."""

    noop = endpoint(acts.noop)
    tick = endpoint(acts.tick)
    ticks = endpoint(acts.ticks)
    pid = endpoint(acts.pid)
    relay = endpoint(acts.relay)
    ignore = endpoint(acts.ignore)
    total = endpoint(acts.total)
    sum_times = endpoint(acts.sum_times)
    produce = endpoint(acts.produce)
    hang = endpoint(acts.hang)
    spin = endpoint(acts.spin)


class AsyncProbe(Actor):
    """The async endpoint; Monarch does not mix sync and async ones in an actor."""

    noop_async = endpoint(acts.noop_async)


class Monarch:
    """torchmonarch."""

    name = "Monarch"
    package = "monarch.actor"

    def open(self) -> None:
        """Keep Monarch from ending the script when the benchmark kills a process."""
        monarch_actor.unhandled_fault_hook = _ignore_fault  # pyright: ignore[reportAttributeAccessIssue]

    def close(self) -> None:
        """End Monarch's processes."""
        shutdown_context().get(timeout=WAIT_S)

    def spawn(self, num_procs: int, *, torch: bool = False, actors: int = 1) -> Group:
        """Start procs; there is no preloading, so that torch is imported by each."""
        procs = this_host().spawn_procs(per_host={"p": num_procs}, bootstrap=_import_torch if torch else None)
        return MeshGroup(
            procs, probe=Probe, async_probe=AsyncProbe, actors=actors, death=(ActorError, SupervisionError)
        )

    def daemons(self, workers: Sequence[int]) -> dict[str, list[int]]:  # noqa: ARG002  the protocol's signature
        """Return nothing: the script is its own host agent."""
        return {}

    def script(self, num_procs: int, torch: TorchUse) -> str:
        """Return a controller script."""
        return _SCRIPT.format(
            script_imports="import torch" if torch is TorchUse.EVERYBODY else "",
            worker_imports="pass" if torch is TorchUse.NOBODY else "import torch",
            num_procs=num_procs,
            limit=WAIT_S,
        )


def _ignore_fault(_failure: Any) -> None:
    pass


def _import_torch() -> None:
    import torch

    assert torch.__version__
