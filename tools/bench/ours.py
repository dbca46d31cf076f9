"""Danaus, as the benchmark drives it: through the public interface only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ...runtime import SupervisionError, shutdown_context, this_host
from .actors import AsyncProbe, Probe
from .mesh_group import MeshGroup
from .placement import descendants, parent_of
from .subject import WAIT_S, Group, TorchUse

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        return MeshGroup(procs, probe=Probe, async_probe=AsyncProbe, actors=actors, death=SupervisionError)

    def daemons(self, workers: Sequence[int]) -> dict[str, list[int]]:
        """Return the host agent (the parent of the workers) and the largest zygote below it."""
        agent = parent_of(workers[0])
        zygotes = [pid for pid in descendants(agent) if pid not in workers]
        return {"agent": [agent], "zygote": sorted(zygotes, key=_resident)[-1:]}

    def script(self, num_procs: int, torch: TorchUse) -> str:
        """Return a controller script; with torch, its endpoint asks for it."""
        return _SCRIPT.format(
            script_imports="import torch" if torch is TorchUse.EVERYBODY else "",
            worker_imports="pass" if torch is TorchUse.NOBODY else "import torch",
            preload={TorchUse.NOBODY: "()", TorchUse.WORKERS: "('torch',)", TorchUse.EVERYBODY: "None"}[torch],
            num_procs=num_procs,
            limit=WAIT_S,
        )


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as statm:
            return int(statm.read().split()[1])
    except OSError:
        return 0
