"""Everything that training changes, as one object: what a checkpoint holds and a peer can hand over."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .models.llama import Llama
from .optimizer import make_optimizer

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from .train_config import TrainConfig


@dataclass(slots=True)
class TrainState:
    """Weights, optimizer and the number of completed steps.

    There is nothing else: data order, learning rate and random numbers are functions of the config and ``step``. A step
    changes this object in one place, after all that can fail (see :meth:`Replica.step`), and within :meth:`changing`.

    Attributes:
        model: The weights.
        optimizer: Its running means, all of them there from the beginning.
        step: Number of completed steps.
        lineage: How often the state was replaced by that of a checkpoint which the user chose.
        is_sound: False while the tensors are overwritten, and for good where that was cut short.
    """

    model: Llama
    optimizer: torch.optim.Optimizer
    step: int = 0
    lineage: int = 0
    is_sound: bool = True

    @classmethod
    def fresh(cls, config: TrainConfig, device: torch.device) -> TrainState:
        """Return the state before the first step, bit-equal on every machine: weights are drawn on the CPU."""
        model = Llama(config.model)
        model.init_weights(config.seed)
        model.to(device)
        return cls(model, make_optimizer(model, config.optimizer))

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, in an order that is the same on every rank; not copies."""
        named = {f"model.{name}": tensor.detach() for name, tensor in self.model.state_dict().items()}
        for name, weight in self.model.named_parameters():
            named.update({f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[weight].items()})
        return named

    def hash(self) -> str:
        """Return the SHA-256 of step, names and bytes: equal for replicas that are equal to the last bit."""
        digest = hashlib.sha256(str(self.step).encode())
        for name, tensor in self.tensors().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @contextmanager
    def changing(self) -> Generator[None]:
        """Overwrite tensors and step in the body; where that raises, the state is unsound until it is replaced."""
        self.is_sound = False
        yield
        self.is_sound = True

    def send(self, group: dist.ProcessGroup, ranks: Iterable[int]) -> None:
        """Hand this state to ``ranks`` of ``group``, which :meth:`receive` it meanwhile.

        Raises:
            RuntimeError: A collective failed.
        """
        works = [
            dist.isend(tensor, group=group, group_dst=rank, tag=tag)
            for rank in ranks
            for tag, tensor in enumerate(self.tensors().values())
        ]
        for work in works:
            work.wait()  # pyright: ignore[reportOptionalMemberAccess]  None is for those outside of the group

    def receive(self, group: dist.ProcessGroup, source: int, *, place: tuple[int, int]) -> None:
        """Take over the state of rank ``source`` of ``group``.

        Args:
            group: Ranks of the run.
            source: The rank that sends.
            place: Its lineage and step.

        Raises:
            RuntimeError: A collective failed; the state is unsound then.
        """
        with self.changing():
            works = [
                dist.irecv(tensor, group=group, group_src=source, tag=tag)
                for tag, tensor in enumerate(self.tensors().values())
            ]
            for work in works:
                work.wait()  # pyright: ignore[reportOptionalMemberAccess]  None is for those outside of the group
            self.lineage, self.step = place


def torch_device() -> torch.device:
    """Return the calling thread's GPU, where this process sees one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
