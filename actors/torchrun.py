"""What torchrun tells each process of a job by its environment. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One rank's place among all, as torchrun counts.

    Attributes:
        rank: Its number among all.
        hosts: The host of every rank, in rank order; any numbers that tell hosts apart.
    """

    rank: int
    hosts: tuple[int, ...]

    @property
    def neighbours(self) -> tuple[int, ...]:
        """The ranks on its host, itself included."""
        return tuple(rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank])

    def environment(self) -> dict[str, str]:
        """Return the variables that say it."""
        nodes = list(dict.fromkeys(self.hosts))
        node, world = nodes.index(self.hosts[self.rank]), len(self.hosts)
        values = {
            "RANK": self.rank,
            "WORLD_SIZE": world,
            "LOCAL_RANK": self.neighbours.index(self.rank),
            "LOCAL_WORLD_SIZE": len(self.neighbours),
            "GROUP_RANK": node,
            "GROUP_WORLD_SIZE": len(nodes),
            "NODE_RANK": node,
            "ROLE_RANK": self.rank,
            "ROLE_WORLD_SIZE": world,
            "ROLE_NAME": "default",
        }
        return {name: str(value) for name, value in values.items()}


def shared_devices(visible: Sequence[str]) -> str | None:
    """Return one CUDA_VISIBLE_DEVICES for the ranks of a host, in which LOCAL_RANK finds each rank's own GPU.

    Args:
        visible: What each of them has now, its own GPU first.

    Returns:
        None where there is nothing to gain: no GPUs, or ranks that share one.
    """
    lists = [[token for token in each.split(",") if token] for each in visible]
    own = [tokens[0] for tokens in lists if tokens]
    # Of MIG devices CUDA opens one, so each rank sees but its own.
    if len(own) < len(lists) or len(set(own)) < len(own) or own[0].startswith("MIG"):
        return None
    return ",".join(dict.fromkeys([*own, *lists[0]]))
