"""Everything that training changes, as one object: what a checkpoint holds and a peer can hand over."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .models.llama import Llama
from .optimizer import make_optimizer

if TYPE_CHECKING:
    from .train_config import TrainConfig


@dataclass(slots=True)
class TrainState:
    """Weights, optimizer and the number of completed steps.

    There is nothing else: data order, learning rate and random numbers are functions of the config and ``step``. A step
    changes this object in one place, after all that can fail (see :meth:`Replica.step`).
    """

    model: Llama
    optimizer: torch.optim.Optimizer
    step: int = 0

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

    def replicate(self, group: dist.ProcessGroup, source: int) -> None:
        """Overwrite this state with that of rank ``source`` of ``group``, which all ranks call together.

        Raises:
            RuntimeError: A collective failed; the state is of no use then, except on ``source``.
        """
        tensors = self.tensors()
        device = next(iter(tensors.values())).device
        step = torch.tensor(self.step, dtype=torch.int64, device=device)
        works = [
            dist.broadcast(tensor, group=group, group_src=source, async_op=True) for tensor in (step, *tensors.values())
        ]
        for work in works:
            work.wait()  # pyright: ignore[reportOptionalMemberAccess]  async_op=True returns one on every member
        self.step = int(step)


def torch_device() -> torch.device:
    """Return the calling thread's GPU, where this process sees one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
