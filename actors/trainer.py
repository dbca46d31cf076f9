"""The trainer actor: a mesh of these trains one model, each rank on its share of every batch."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..runtime.actor import Actor, endpoint
from ..runtime.collectives.groups import process_group
from ..runtime.context import current_rank
from .checkpoints import newest_checkpoint
from .replica import Replica, StepMetrics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .corpus import Corpus
    from .train_config import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """Where a rank runs and what it holds.

    Attributes:
        rank: Number in the mesh.
        host: Host name.
        pid: Process id on that host.
        device: Torch's name of the device.
        num_threads: Threads of torch's CPU operations.
        num_parameters: Weights of the model.
        step: Completed steps.
    """

    rank: int
    host: str
    pid: int
    device: str
    num_threads: int
    num_parameters: int
    step: int


class Trainer(Actor):
    """Data-parallel training over all dimensions of the mesh that it is spawned on.

    Call ``step``, ``train_steps``, ``evaluate`` and ``replicate`` on the whole mesh: their ranks wait for each other.
    ``save``, ``load``, ``resume`` and ``sample`` are each rank's own affair: call them on one.

    Example:
        >>> from danaus import this_host
        >>> from danaus.actors import Trainer, TrainConfig, make_corpus
        >>> from danaus.actors.models import tiny
        >>> config = TrainConfig(model=tiny(), seq_len=32, batch_size=8)
        >>> corpus = make_corpus(["to be or not to be, that is the question. " * 100])
        >>> with this_host().spawn_procs({"dp": 2}, preload=Trainer.PRELOAD) as procs:
        ...     trainers = procs.spawn("trainers", Trainer, config, corpus)
        ...     losses = [trainers.step.call().get(timeout=60).item(dp=0).loss for _ in range(5)]
        >>> losses[-1] < losses[0]
        True
    """

    PRELOAD: ClassVar = ("danaus.actors", "numpy", "torch._dynamo", "torch.distributed.checkpoint")
    """For ``spawn_procs(preload=...)``: torch's optimizers import its compiler, which takes more than a second, and the
    first checkpoint imports the rest."""

    def __init__(self, config: TrainConfig, corpus: Corpus) -> None:
        self._replica = Replica(config, corpus, rank=current_rank().rank, num_ranks=current_rank().extent.nelements)

    def _group(self) -> torch.distributed.ProcessGroup | None:
        return process_group() if self._replica.num_ranks > 1 else None

    @endpoint
    def describe(self) -> RankInfo:
        """Return where this rank runs and what it holds."""
        replica = self._replica
        return RankInfo(
            rank=replica.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=str(replica.device),
            num_threads=torch.get_num_threads(),
            num_parameters=replica.state.model.num_parameters(),
            step=replica.state.step,
        )

    @endpoint
    def step(self) -> StepMetrics:
        """Train on one global batch. See :meth:`Replica.step` for what it raises."""
        return self._replica.step(self._group())

    @endpoint
    def train_steps(self, num_steps: int) -> Iterator[StepMetrics]:
        """Train on ``num_steps`` global batches without waiting for the caller in between."""
        for _ in range(num_steps):
            yield self._replica.step(self._group())

    @endpoint
    def evaluate(self) -> float:
        """Return the mean loss per token, in nats, on held-out text."""
        return self._replica.evaluate(self._group())

    @endpoint
    def save(self, directory: str, *, keep: int = 3) -> str:
        """Write a checkpoint on this rank's host and return its path; all but the newest ``keep`` are removed."""
        return str(self._replica.save(directory, keep=keep))

    @endpoint
    def load(self, path: str, *, exact: bool = True) -> int:
        """Take the state from a checkpoint; return the number of completed steps.

        Args:
            path: The checkpoint, on this rank's host.
            exact: Refuse one of another run; otherwise only model and tokenizer have to be the same.

        Raises:
            FileNotFoundError: ``path`` is no complete checkpoint.
            ValueError: It is of another run, or does not fit.
        """
        return self._replica.load(path, exact=exact)

    @endpoint
    def resume(self, directory: str, *, exact: bool = True) -> int:
        """Take the state from the newest complete checkpoint in ``directory``, as :meth:`load` does.

        Returns:
            The number of completed steps; 0, with nothing changed, where there is no checkpoint.
        """
        newest = newest_checkpoint(directory)
        return 0 if newest is None else self._replica.load(newest, exact=exact)

    @endpoint
    def replicate(self, source: int = 0) -> int:
        """Take the state of rank ``source`` over the process group; return the number of completed steps."""
        group = self._group()
        return self._replica.state.step if group is None else self._replica.replicate(group, source)

    @endpoint
    def sample(
        self, prompt: str, *, max_tokens: int = 200, temperature: float = 0.8, top_k: int | None = 40, seed: int = 0
    ) -> str:
        """Return ``prompt`` and what the model writes after it."""
        return self._replica.sample(prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed)

    @endpoint
    def state_hash(self) -> str:
        """Return the SHA-256 of weights, optimizer and step number; equal on all ranks at all times."""
        return self._replica.state.hash()
