"""The trainer actor: a mesh of these trains one model, each rank on its share of every batch."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..runtime.actor import Actor, endpoint
from ..runtime.collectives import groups
from ..runtime.collectives.root_cause import cause_of
from ..runtime.context import current_key, current_rank
from ..runtime.errors import DanausError
from ..runtime.testing import point
from .agreement import Kind, Work
from .checkpoints import checkpoint_path
from .peers import Peers, StepCompletedError, SupersededError
from .replica import Replica, StepMetrics

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from .corpus import Corpus
    from .train_config import TrainConfig

_log = logging.getLogger("danaus")

MEET_LIMIT_S = 600.0
"""How long a rank waits for the others: as long as the longest of them may compute before it hears of a loss."""


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

    Call endpoints on the whole mesh, since its ranks may have to wait for each other; ``describe`` can be asked of any.

    Spawn it with ``restart=Restart()`` and no step is lost with a rank. The call under way fails with
    ``SupervisionError``; ``error.failure.restarts`` says that the same call may be made again, on the same mesh. The
    other ranks were not touched, the new one takes their state, what was completed is not done twice, and all end as if
    nothing had happened. Name the step for that: ``step(target)`` is the same however often it is called, ``step()`` is
    one more each time. Where no rank is left, the state is that of the newest of ``checkpoints``.

    Args:
        config: The run.
        corpus: Its text.
        checkpoints: Folder in which rank 0 saves. The newest checkpoint that any rank finds there is the state to begin
            with.
        exact: Refuse a checkpoint of another run; otherwise only model and tokenizer have to be the same.

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

    def __init__(
        self, config: TrainConfig, corpus: Corpus, *, checkpoints: str | None = None, exact: bool = True
    ) -> None:
        rank = current_rank()
        self._replica = Replica(config, corpus, rank=rank.rank, num_ranks=rank.extent.nelements)
        self._peers = Peers(self._replica, checkpoints=checkpoints, exact=exact)
        self._group: torch.distributed.ProcessGroup | None = None
        self._join()

    def _join(self) -> None:
        """Meet the other ranks, who wait for this one without a call; where that fails, the next call does it."""
        try:
            with self._together():
                pass
        except (DanausError, RuntimeError, TimeoutError) as error:
            _log.debug("rank %d has not met the others yet: %s", self._replica.rank, error)

    def _own_group(self) -> torch.distributed.ProcessGroup:
        group = groups.process_group(timeout=MEET_LIMIT_S)
        if self._group is None:
            self._group = group
            groups.on_reformed(group, self._on_reformed)
        return group

    def _on_reformed(self, generation: int) -> None:
        """The group has formed again without a call: some rank may need the state of this one."""
        assert self._group is not None
        with self._releasing(self._group):
            self._peers.meet(self._group, generation)

    @contextmanager
    def _together(self, kind: Kind = Kind.NOTHING, step: int = 0) -> Generator[torch.distributed.ProcessGroup | None]:
        """Have the same state as all ranks in the body, which may hold collectives."""
        if self._replica.num_ranks == 1:
            self._peers.meet(None, 0)
            yield None
            return
        group = self._own_group()
        with self._releasing(group):
            self._peers.meet(group, groups.generation(group), Work(kind, step))
            yield group

    @contextmanager
    def _releasing(self, group: torch.distributed.ProcessGroup) -> Generator[None]:
        """Release the others, where this rank alone fails in the body and leaves them in a collective."""
        try:
            yield
        except (FloatingPointError, StepCompletedError, SupersededError):
            # these come on all ranks alike, or leave nobody waiting
            raise
        except Exception as error:
            # What fails the actor itself, as SystemExit does, releases them with the actor's end, which tells why.
            # What follows from the loss of another rank has released them already.
            if cause_of(current_key(), error) is None:
                groups.break_group(group, f"rank {self._replica.rank} failed with {type(error).__name__}: {error}")
            raise

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
    def sync(self) -> int:
        """Have one state on all ranks; return the number of completed steps."""
        with self._together():
            return self._replica.state.step

    @endpoint
    def step(self, target: int | None = None) -> StepMetrics:
        """Train until ``target`` steps are completed, by default one more; return the metrics of the last.

        Raises:
            ValueError: A later step than ``target`` is completed already.
            FloatingPointError: The gradient is not finite; the state is that before the step.
        """
        with self._together(Kind.STEP, target or 0) as group:
            return self._peers.step(group, target)

    @endpoint
    def train_steps(self, num_steps: int) -> Iterator[StepMetrics]:
        """Train on ``num_steps`` global batches without waiting for the caller in between.

        Where a rank may be lost, ``step(target)`` says better what is to be done again.
        """
        for _ in range(num_steps):
            with self._together(Kind.STEP) as group:
                metrics = self._peers.step(group)
            yield metrics

    @endpoint
    def evaluate(self) -> float:
        """Return the mean loss per token, in nats, on held-out text."""
        with self._together(Kind.EVALUATE) as group:
            return self._peers.evaluate(group)

    @endpoint
    def save(self, directory: str | None = None, *, keep: int = 3) -> str:
        """Have rank 0 write a checkpoint and return its path; all but the newest ``keep`` are removed.

        Args:
            directory: Where, on the host of rank 0; by default the folder of the trainers' checkpoints.
            keep: How many to keep.

        Raises:
            ValueError: There is no default, or ``keep`` is below 1.
            OSError: The checkpoint could not be written; earlier ones are as they were.
        """
        folder = directory or self._peers.checkpoints
        if folder is None:
            raise ValueError("save(): name a directory here, or spawn the trainers with checkpoints=DIRECTORY")
        replica = self._replica
        with self._together():
            if replica.rank == 0:
                return str(replica.save(folder, keep=keep))
            point("checkpoint", step=replica.state.step)
            return str(checkpoint_path(folder, replica.state.step))

    @endpoint
    def load(self, path: str, *, rank: int = 0, exact: bool = True) -> int:
        """Take the state from a checkpoint; return the number of completed steps.

        Args:
            path: The checkpoint, on the host of rank ``rank``.
            rank: Who reads it, and hands it to the others.
            exact: Refuse one of another run; otherwise only model and tokenizer have to be the same.

        Raises:
            FileNotFoundError: ``path`` is no complete checkpoint.
            ValueError: It is of another run, or does not fit; or there is no such rank.
        """
        if not 0 <= rank < self._replica.num_ranks:
            raise ValueError(f"load(rank={rank}): the ranks are 0 to {self._replica.num_ranks - 1}")
        with self._together() as group:
            error = self._peers.load(group, path, rank=rank, exact=exact)
        if error is not None:
            raise error
        with self._together():
            return self._replica.state.step

    @endpoint
    def sample(
        self, prompt: str, *, max_tokens: int = 200, temperature: float = 0.8, top_k: int | None = 40, seed: int = 0
    ) -> str:
        """Return ``prompt`` and what the model writes after it."""
        with self._together():
            return self._replica.sample(prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed)

    @endpoint
    def state_hash(self) -> str:
        """Return the SHA-256 of weights, optimizer and step number; equal on all ranks at all times."""
        with self._together():
            return self._replica.state.hash()
