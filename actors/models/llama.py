"""A Llama-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, a tied or untied head.

Shapes:  B = sequences, T = new tokens, S = tokens attended to, D = model width, H = query heads, K = key/value heads,
         E = head width, F = hidden width of the feed-forward block, V = vocabulary.

Module names, the rotation of halves and the fp32 norm follow Hugging Face's Llama, so its weights fit after renaming.
Nothing is kept that does not come from a checkpoint or from ``init_weights``: a model made on the meta device works.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import fused
from .experts import Experts

if TYPE_CHECKING:
    from .cache import KVCache

Kernels = Literal["torch", "reference", "triton"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig:
    """Size of a :class:`Llama`. Variants are functions: :func:`tiny`, :func:`small`, :func:`base`."""

    vocab_size: int
    """Number of token ids."""
    width: int
    """Width of the residual stream."""
    num_layers: int
    """Number of blocks."""
    num_heads: int
    """Query heads; ``width`` is divided among them."""
    num_kv_heads: int
    """Key and value heads, each shared by ``num_heads / num_kv_heads`` query heads."""
    hidden_width: int
    """Width inside the feed-forward block."""
    max_seq_len: int
    """Longest sequence, and the most tokens that a cache holds."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    norm_eps: float = 1e-5
    """Added to the mean square before the root."""
    tied_head: bool = True
    """Whether the head shares the embedding's matrix."""
    dropout: float = 0.0
    """Probability of dropping an element of what a block adds to the residual stream, in training."""
    num_experts: int = 0
    """Feed-forward blocks of ``hidden_width`` in each layer, among which a router chooses; 0 for one and no router."""
    experts_per_token: int = 2
    """How many of them each token goes through."""
    kernels: Kernels = "torch"
    """Who computes attention, norms, rotary positions, activation, experts and loss: torch itself, or
    ``danaus.kernels`` by its references or by its Triton kernels. Like the device it changes how results are rounded
    and nothing else."""

    def __post_init__(self) -> None:
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"LlamaConfig: experts_per_token {self.experts_per_token} must be 1 to num_experts {self.num_experts}"
            )
        if self.kernels not in get_args(Kernels):
            raise ValueError(f"LlamaConfig: kernels {self.kernels!r} is unknown; use one of {get_args(Kernels)}")
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"LlamaConfig: width {self.width} over {self.num_heads} heads gives no even head width; "
                f"use a multiple of {2 * self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"LlamaConfig: {self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly; "
                "use a divisor"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LlamaConfig: dropout {self.dropout} is outside of [0, 1)")

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.num_heads


def tiny(vocab_size: int = 256, max_seq_len: int = 64) -> LlamaConfig:
    """Return the smallest model that has every part: about 30 thousand weights, for tests."""
    return LlamaConfig(
        vocab_size=vocab_size,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        hidden_width=80,
        max_seq_len=max_seq_len,
    )


def small(vocab_size: int = 256, max_seq_len: int = 256) -> LlamaConfig:
    """Return a model that learns to write on two CPU cores in a minute: about 0.7 million weights."""
    return LlamaConfig(
        vocab_size=vocab_size,
        width=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        hidden_width=344,
        max_seq_len=max_seq_len,
    )


def base(vocab_size: int = 32_768, max_seq_len: int = 2_048) -> LlamaConfig:
    """Return a model for one GPU: about 100 million weights beside the embedding."""
    return LlamaConfig(
        vocab_size=vocab_size,
        width=768,
        num_layers=16,
        num_heads=12,
        num_kv_heads=4,
        hidden_width=2_048,
        max_seq_len=max_seq_len,
    )


class RMSNorm(nn.Module):
    """Division by the root mean square of the last dimension, in fp32, times a learned weight."""

    def __init__(self, width: int, eps: float, kernels: Kernels = "torch") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.kernels: Kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x[..., D]``; returns its dtype."""
        if self.kernels != "torch":
            return fused.rms_norm(x, self.weight, self.eps, impl=self.kernels)
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def rope_tables(first: int, num_tokens: int, config: LlamaConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return fp32 ``(cos_TE, sin_TE)`` for ``num_tokens`` positions from ``first`` on; both halves of E are equal."""
    exponent = torch.arange(0, config.head_width, 2, device=device, dtype=torch.float32) / config.head_width
    position_T = torch.arange(first, first + num_tokens, device=device, dtype=torch.float32)
    angle_TE = torch.outer(position_T, config.rope_theta**-exponent).repeat(1, 2)
    return angle_TE.cos(), angle_TE.sin()


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor, kernels: Kernels = "torch") -> Tensor:
    """Turn element i of every head against element i + E/2 by its position's angle; returns ``x``'s dtype."""
    if kernels != "torch":
        return fused.rotate(x_BHTE, cos_TE, sin_TE, impl=kernels)
    first, second = x_BHTE.float().chunk(2, dim=-1)
    turned_BHTE = x_BHTE.float() * cos_TE + torch.cat((-second, first), dim=-1) * sin_TE
    return turned_BHTE.to(x_BHTE.dtype)


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.kernels: Kernels = config.kernels
        kv_width = config.num_kv_heads * config.head_width
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, kv_width, bias=False)
        self.v_proj = nn.Linear(config.width, kv_width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None, layer: int) -> Tensor:
        """Attend from each of the T new tokens to itself and all before it, those in ``cache`` included."""
        q_BHTE = rotate(self._heads(self.q_proj(x_BTD)), *rope, self.kernels)
        k_BKSE = rotate(self._heads(self.k_proj(x_BTD)), *rope, self.kernels)
        v_BKSE = self._heads(self.v_proj(x_BTD))
        seen = 0
        if cache is not None:
            seen = cache.length
            k_BKSE, v_BKSE = cache.extend(layer, k_BKSE, v_BKSE)
        if self.kernels == "torch":
            out_BHTE = attend(q_BHTE, k_BKSE, v_BKSE, seen)
        else:
            out_BHTE = fused.attend(q_BHTE, k_BKSE, v_BKSE, impl=self.kernels)
        return self.o_proj(out_BHTE.transpose(1, 2).flatten(2))

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


def attend(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, seen: int) -> Tensor:
    """Attend from each of T new tokens to itself and all before it, the ``seen`` older ones included."""
    num_new = q_BHTE.shape[2]
    mask_TS = causal_mask(num_new, seen, q_BHTE.device) if seen and num_new > 1 else None
    return functional.scaled_dot_product_attention(
        q_BHTE, k_BKSE, v_BKSE, attn_mask=mask_TS, is_causal=not seen, enable_gqa=True
    )


def causal_mask(num_new: int, seen: int, device: torch.device) -> Tensor:
    """Return the boolean ``mask_TS`` by which new token t sees the ``seen`` tokens before and new ones up to itself."""
    return torch.ones(num_new, seen + num_new, dtype=torch.bool, device=device).tril(seen)


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.kernels: Kernels = config.kernels
        self.gate_proj = nn.Linear(config.width, config.hidden_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden_width, bias=False)
        self.down_proj = nn.Linear(config.hidden_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Transform each token by itself."""
        gate_BTF, up_BTF = self.gate_proj(x_BTD), self.up_proj(x_BTD)
        if self.kernels == "torch":
            return self.down_proj(functional.silu(gate_BTF) * up_BTF)
        return self.down_proj(fused.swiglu(gate_BTF, up_BTF, impl=self.kernels))


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps, config.kernels)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps, config.kernels)
        self.mlp = Experts(config) if config.num_experts else FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None, layer: int) -> Tensor:
        """Return the residual stream after this block."""
        x_BTD = x_BTD + self.dropout(self.self_attn(self.input_layernorm(x_BTD), rope, cache, layer))
        return x_BTD + self.dropout(self.mlp(self.post_attention_layernorm(x_BTD)))


class Llama(nn.Module):
    """The decoder: token ids in, logits out.

    Weights are as ``nn.Linear`` makes them until :meth:`init_weights`.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps, config.kernels)
        self.lm_head = None if config.tied_head else nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return ``logits_BTV`` for the token after each of ``tokens_BT``.

        Args:
            tokens_BT: int64 ids. With a cache, the tokens after those that it holds already.
            cache: Keys and values of earlier tokens, extended in place.

        Raises:
            ValueError: The sequence would be longer than ``config.max_seq_len``.
        """
        x_BTD = self._hidden(tokens_BT, cache)
        return functional.linear(x_BTD, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(x_BTD)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return what :func:`next_token_loss` makes of the logits; with kernels, without holding all of them.

        Args:
            tokens_BT: int64 ids.
            targets_BT: int64 ids of the token after each.

        Raises:
            ValueError: The sequence is longer than ``config.max_seq_len``.
        """
        if self.config.kernels == "torch":
            return next_token_loss(self(tokens_BT), targets_BT)
        head_VD = (self.embed_tokens if self.lm_head is None else self.lm_head).weight
        return fused.sum_of_losses(self._hidden(tokens_BT), head_VD, targets_BT, impl=self.config.kernels)

    def _hidden(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """The normalised residual stream after the last block."""
        first, num_new = (0 if cache is None else cache.length), tokens_BT.shape[1]
        if first + num_new > self.config.max_seq_len:
            raise ValueError(f"Llama: {first + num_new} tokens do not fit max_seq_len={self.config.max_seq_len}")
        rope = rope_tables(first, num_new, self.config, tokens_BT.device)
        x_BTD = self.embed_tokens(tokens_BT)
        for layer, block in enumerate(self.layers):
            x_BTD = block(x_BTD, rope, cache, layer)
        if cache is not None:
            cache.length += num_new
        return self.norm(x_BTD)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights anew, the same for a seed on every machine when the model lies on the CPU.

        Matrices are normal with deviation 0.02; those that write to the residual stream are divided by the root of
        their number, so that its variance does not grow with depth.
        """
        generator = torch.Generator(self.embed_tokens.weight.device).manual_seed(seed)
        shrink = 1 / math.sqrt(2 * self.config.num_layers)
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
            else:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
                weight.normal_(0.0, 0.02 * (shrink if writes_residual else 1.0), generator=generator)

    def num_parameters(self) -> int:
        """Return the number of weights."""
        return sum(weight.numel() for weight in self.parameters())


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the fp32 sum over all tokens of the cross-entropy in nats; divide by the global number of tokens."""
    return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="sum")
