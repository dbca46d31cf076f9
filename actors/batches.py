"""Which tokens a step trains on: a function of the seed, the step and the number of the sample, not of the ranks.

Shapes:  G = sequences of a step's global batch, B = sequences of a rank's share, T = tokens of a sequence.

Each epoch cuts the tokens into windows of T + 1 that share one token with the next, from a start that changes with the
epoch, and shuffles them. Sample g of step s is window ``s * G + g`` of the endless row of epochs, so that a run which
goes on after a checkpoint, or with another number of ranks, sees what it would have seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


def mixed_seed(*parts: int) -> int:
    """Return a 63-bit seed from whole numbers; near numbers give unrelated seeds (the finaliser of splitmix64)."""
    mask = (1 << 64) - 1
    state = 0
    for part in parts:
        state = (state + (part & mask) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def share(rank: int, num_ranks: int, batch_size: int) -> range:
    """Return the samples of a global batch of ``batch_size`` that fall to ``rank``: a contiguous part.

    Raises:
        ValueError: The ranks do not divide the batch.
    """
    if batch_size % num_ranks:
        raise ValueError(f"a batch of {batch_size} sequences is not shared evenly by {num_ranks} ranks; use a multiple")
    each = batch_size // num_ranks
    return range(rank * each, (rank + 1) * each)


class Batches:
    """The endless, shuffled row of training windows over one tensor of tokens.

    Args:
        tokens_N: Token ids of any integer dtype, on the CPU.
        seq_len: Tokens per sequence.
        batch_size: Sequences of a step over all ranks.
        seed: Of the shuffles.

    Raises:
        ValueError: There are too few tokens for two windows.
    """

    def __init__(self, tokens_N: Tensor, *, seq_len: int, batch_size: int, seed: int) -> None:
        # one less than there is room for: an epoch starts at any of the first seq_len tokens
        self.windows_per_epoch = len(tokens_N) // seq_len - 1
        if self.windows_per_epoch < 1:
            raise ValueError(
                f"{len(tokens_N)} tokens are too few for sequences of {seq_len}; give more text, or use a seq_len "
                f"of at most {len(tokens_N) // 2}"
            )
        self._tokens_N, self._seq_len, self._batch_size, self._seed = tokens_N, seq_len, batch_size, seed
        self._epoch = -1
        self._start = 0
        self._order = torch.empty(0, dtype=torch.int64)

    def take(self, step: int, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return int64 ``(inputs_BT, targets_BT)`` for these samples of the global batch of ``step``."""
        windows = [self._window(step * self._batch_size + sample) for sample in samples]
        tokens_BT = torch.stack(windows).long()
        return tokens_BT[:, :-1], tokens_BT[:, 1:]

    def epoch_of(self, step: int) -> float:
        """Return how many times the text has been gone through before ``step``."""
        return step * self._batch_size / self.windows_per_epoch

    def _window(self, number: int) -> Tensor:
        epoch, position = divmod(number, self.windows_per_epoch)
        if epoch != self._epoch:
            self._shuffle(epoch)
        first = self._start + int(self._order[position]) * self._seq_len
        return self._tokens_N[first : first + self._seq_len + 1]

    def _shuffle(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(mixed_seed(self._seed, epoch))
        self._start = int(torch.randint(self._seq_len, (), generator=generator))
        self._order = torch.randperm(self.windows_per_epoch, generator=generator)
        self._epoch = epoch


def validation_windows(tokens_N: Tensor, *, seq_len: int, max_windows: int) -> tuple[Tensor, Tensor]:
    """Return int64 ``(inputs_BT, targets_BT)``: up to ``max_windows`` windows spread evenly over ``tokens_N``.

    Raises:
        ValueError: There are too few tokens for one window.
    """
    num_windows = (len(tokens_N) - 1) // seq_len
    if num_windows < 1:
        raise ValueError(f"{len(tokens_N)} held-out tokens are too few for a sequence of {seq_len}; hold out more text")
    chosen = torch.linspace(0, num_windows - 1, min(max_windows, num_windows)).long()
    tokens_BT = torch.stack([tokens_N[i * seq_len : (i + 1) * seq_len + 1] for i in chosen.tolist()]).long()
    return tokens_BT[:, :-1], tokens_BT[:, 1:]
