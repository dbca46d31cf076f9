"""One rank's copy of a training run: plain torch, with the process group as an argument of what needs one.

Shapes:  B = sequences, T = tokens of a sequence, V = vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..runtime.testing import point
from .batches import Batches, mixed_seed, share, validation_windows
from .checkpoints import Manifest, load_checkpoint, read_manifest, save_checkpoint
from .gradients import GradientBuckets
from .memory import MemoryMeter
from .models.generate import generate
from .optimizer import learning_rate, set_learning_rate
from .train_state import TrainState, torch_device

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .corpus import Corpus
    from .train_config import TrainConfig

_log = logging.getLogger("danaus")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """What one step did, as one rank saw it.

    Attributes:
        step: Number of completed steps, this one included.
        loss: Mean over the tokens of the global batch, in nats, before the step.
        grad_norm: Global norm of the gradient before clipping.
        lr: Learning rate of the step.
        num_tokens: Tokens of the global batch.
        duration_s: From the first forward to the updated weights.
        memory_bytes: See :class:`MemoryMeter`.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    num_tokens: int
    duration_s: float
    memory_bytes: int


class Replica:
    """Model, optimizer and data of one rank.

    Methods with a ``group`` are collective: all ranks of it call them in the same order. None means this rank alone.
    :class:`Peers` brings replicas together that are not at the same step.

    Attributes:
        state: What training changes.
        last: What was reported of the last completed step, by this rank or by the one that its state is from.

    Args:
        config: The run.
        corpus: Its text.
        rank: This rank's number.
        num_ranks: Number of ranks that share each batch.
        device: None takes this thread's GPU, where there is one, else the CPU.

    Raises:
        ValueError: The ranks do not divide the batch, the text is too short, or has tokens that the model lacks.
    """

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        device: torch.device | None = None,
    ) -> None:
        if config.model.vocab_size < corpus.tokenizer.vocab_size:
            raise ValueError(
                f"the model knows {config.model.vocab_size} tokens and the text has {corpus.tokenizer.vocab_size}; "
                "set vocab_size to the tokenizer's"
            )
        self.config, self.corpus, self.rank, self.num_ranks = config, corpus, rank, num_ranks
        self.device = device or torch_device()
        self._samples = share(rank, num_ranks, config.batch_size)
        self._batches = Batches(
            corpus.train_tokens, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed
        )
        self._held_out = validation_windows(corpus.val_tokens, seq_len=config.seq_len, max_windows=config.eval_windows)
        self.state = TrainState.fresh(config, self.device)
        self.last: StepMetrics | None = None
        self._memory = MemoryMeter(self.device)
        self._buckets = GradientBuckets(self.state.model.parameters(), bucket_bytes=config.bucket_bytes)

    def step(self, group: dist.ProcessGroup | None = None) -> StepMetrics:
        """Train on one global batch.

        Until the gradients of all ranks are in and sound, nothing else changes; then weights, optimizer and step do.

        Raises:
            RuntimeError: A collective failed; the state is that before the step. Or an earlier update was cut short.
            FloatingPointError: The gradient is not finite; the state is that before the step.
            Exception: The update itself failed; the state is unsound.
        """
        self.check_sound()
        started_s = time.perf_counter()
        state, config = self.state, self.config
        loss = self._gradients(group)
        weights = list(state.model.parameters())
        norm = float(torch.nn.utils.clip_grad_norm_(weights, config.optimizer.max_grad_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"step {state.step}: loss {loss:g} and gradient norm {norm:g}; the weights are those before the step. "
                "Lower peak_lr, warm up longer, or look at the data of this step"
            )
        lr = learning_rate(state.step, config.optimizer)
        with state.changing():
            set_learning_rate(state.optimizer, lr)
            state.optimizer.step()
            point("optimizer", step=state.step + 1)
            state.step += 1
        now_s = time.perf_counter()
        self.last = StepMetrics(
            step=state.step,
            loss=loss,
            grad_norm=norm,
            lr=lr,
            num_tokens=config.tokens_per_step,
            duration_s=now_s - started_s,
            memory_bytes=self._memory.read_bytes(now_s=now_s),
        )
        return self.last

    def check_sound(self) -> None:
        """Raise where an update of the state was cut short.

        Raises:
            RuntimeError: It was.
        """
        if not self.state.is_sound:
            raise RuntimeError(
                f"the state of rank {self.rank} was overwritten in part when it failed after step {self.state.step}: "
                "load a checkpoint, or let Peers.meet take the state of another rank"
            )

    def _gradients(self, group: dist.ProcessGroup | None) -> float:
        """Fill the gradients of the global mean loss, equal on all ranks; return that loss."""
        config, model, number = self.config, self.state.model, self.state.step + 1
        if config.model.dropout:
            torch.manual_seed(mixed_seed(config.seed, self.state.step, self.rank))
        self._buckets.begin()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for samples, is_last in self._micro_batches():
            point("data", step=number)
            inputs_BT, targets_BT = self._batches.take(self.state.step, samples)
            point("forward", step=number)
            with self._autocast():
                loss = model.loss(inputs_BT.to(self.device), targets_BT.to(self.device))
            loss_sum += loss.detach()
            point("backward", step=number)
            if is_last:
                self._buckets.send_during(group)
            (loss / config.tokens_per_step).backward()
        self._buckets.finish()
        point("all_reduce", step=number)
        # after the buckets: every rank has to start the same collectives in turn
        if group is not None:
            dist.all_reduce(loss_sum, group=group)
        return float(loss_sum) / config.tokens_per_step

    def _micro_batches(self) -> Iterator[tuple[range, bool]]:
        size = self.config.micro_batch_size
        for first in range(0, len(self._samples), size):
            yield self._samples[first : first + size], first + size >= len(self._samples)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    @torch.no_grad()
    def evaluate(self, group: dist.ProcessGroup | None = None) -> float:
        """Return the mean loss per token, in nats, on held-out text; the ranks of ``group`` share the work."""
        model = self.state.model
        inputs_BT, targets_BT = (part_BT[self.rank :: self.num_ranks] for part_BT in self._held_out)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        model.eval()
        for start in range(0, len(inputs_BT), self.config.micro_batch_size):
            rows = slice(start, start + self.config.micro_batch_size)
            with self._autocast():
                sums[0] += model.loss(inputs_BT[rows].to(self.device), targets_BT[rows].to(self.device))
            sums[1] += targets_BT[rows].numel()
        model.train()
        if group is not None:
            dist.all_reduce(sums, group=group)
        return float(sums[0] / sums[1])

    def sample(
        self, prompt: str, *, max_tokens: int, temperature: float = 0.8, top_k: int | None = 40, seed: int = 0
    ) -> str:
        """Return ``prompt`` and up to ``max_tokens`` tokens that the model writes after it, up to an end mark.

        Raises:
            ValueError: Prompt and new tokens do not fit the model's positions.
        """
        tokenizer = self.corpus.tokenizer
        ids = tokenizer.encode(prompt)
        # with nothing to go on from, the start of a document is what follows an end
        prompt_BT = torch.tensor([ids or [tokenizer.end_id]], device=self.device)
        made = generate(
            self.state.model, prompt_BT, max_new_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed
        )
        for tokens_B in made:
            ids.append(int(tokens_B))
            if ids[-1] == tokenizer.end_id:
                break
        return tokenizer.decode(ids)

    def identity(self) -> dict[str, Any]:
        """Return what the course of this run depends on, as JSON knows it."""
        return {
            **self.config.identity(),
            "tokenizer": self.corpus.tokenizer.fingerprint,
            "corpus": self.corpus.fingerprint,
        }

    def save(self, directory: str | Path, *, keep: int = 3) -> Path:
        """Write a checkpoint of this replica, which stands for all; see :func:`save_checkpoint`.

        Raises:
            RuntimeError: The last update of the state was cut short.
        """
        self.check_sound()
        last = None if self.last is None else asdict(self.last)
        manifest = Manifest(self.state.step, self.identity(), last)
        return save_checkpoint(directory, self.state.tensors(), manifest, keep=keep)

    def load(self, path: str | Path, *, exact: bool = True) -> int:
        """Take the state from a checkpoint.

        Args:
            path: The checkpoint.
            exact: Require that it is of this very run, so that going on equals never having stopped. Otherwise model
                and tokenizer have to be the same.

        Returns:
            The number of completed steps.

        Raises:
            FileNotFoundError: ``path`` is no complete checkpoint.
            ValueError: It is of another run, or does not fit.
        """
        differences = read_manifest(path).differences(self.identity())
        fatal = [text for text in differences if exact or text.startswith(("model.", "tokenizer "))]
        if fatal:
            advice = "to go on from its weights, load with exact=False" if exact else "make a model of the same kind"
            raise ValueError(f"{path} is of another run: {'; '.join(fatal)}. Use the same settings, or, {advice}")
        if differences:
            _log.warning("going on from %s with other settings: %s", path, "; ".join(differences))
        with self.state.changing():
            manifest = load_checkpoint(path, self.state.tensors())
            self.state.step = manifest.step
        self.last = None if manifest.metrics is None else StepMetrics(**manifest.metrics)
        return self.state.step
