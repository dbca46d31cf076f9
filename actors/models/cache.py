"""Keys and values of the tokens that a decoder has seen, so that each new token costs one token's work.

Shapes:  B = sequences, T = new tokens, S = tokens so far, K = key/value heads, E = head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of every layer, for use under ``torch.no_grad()``.

    Attributes:
        length: Number of tokens held; the model raises it once all layers have been extended.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        max_seq_len: int,
        head_width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        shape = (num_layers, 2, batch_size, num_kv_heads, max_seq_len, head_width)
        self._kv = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def extend(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's new keys and values; return views ``(k_BKSE, v_BKSE)`` of all so far."""
        end = self.length + k_BKTE.shape[2]
        k_BKSE, v_BKSE = self._kv[layer, 0, :, :, :end], self._kv[layer, 1, :, :, :end]
        k_BKSE[:, :, self.length :] = k_BKTE
        v_BKSE[:, :, self.length :] = v_BKTE
        return k_BKSE, v_BKSE
