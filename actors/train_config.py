"""What a training run is: model, optimizer and data order. Two runs of one config and corpus compute the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .optimizer import OptimizerConfig

if TYPE_CHECKING:
    from .models.llama import LlamaConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A training run, but for its text, its ranks and its files."""

    model: LlamaConfig
    """Size of the model."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rate."""
    seed: int = 0
    """Of the weights, the data order and dropout."""
    seq_len: int = 128
    """Tokens per sequence."""
    batch_size: int = 32
    """Sequences per step over all ranks, which have to divide it."""
    micro_batch_size: int = 8
    """Sequences per forward and backward pass of a rank; gradients are accumulated over the passes of a step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the matrix products; weights, gradients and optimizer are fp32 in either case."""
    bucket_bytes: int = 4 << 20
    """Size of the buckets in which gradients are summed over the ranks."""
    eval_windows: int = 32
    """Held-out sequences per evaluation, over all ranks."""

    def __post_init__(self) -> None:
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"TrainConfig: seq_len {self.seq_len} is above the model's max_seq_len {self.model.max_seq_len}; "
                "lower the one or raise the other"
            )
        for name in ("seq_len", "batch_size", "micro_batch_size", "bucket_bytes", "eval_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig: {name} {getattr(self, name)} must be 1 or more")
        if self.precision not in {"fp32", "bf16"}:
            raise ValueError(f'TrainConfig: precision {self.precision!r} is unknown; use "fp32" or "bf16"')

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step trains on, over all ranks."""
        return self.batch_size * self.seq_len

    def identity(self) -> dict[str, Any]:
        """Return the fields, as JSON knows them, on which the course of a run depends."""
        fields = asdict(self)
        for name in ("micro_batch_size", "bucket_bytes", "eval_windows"):
            del fields[name]
        # Like the device, kernels change how results are rounded, not what is computed.
        del fields["model"]["kernels"]
        fields["optimizer"]["betas"] = list(self.optimizer.betas)
        return fields
