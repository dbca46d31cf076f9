"""The definition in plain torch, and the options as both implementations take them."""

from __future__ import annotations

import torch

Option = torch.Tensor | float | int | None

MAX_VOCAB = 2**24
"""Tokens are counted in fp32, which knows every whole number up to here."""

_PHILOX_ROUNDS = 10


def kept_reference(
    logits_BV: torch.Tensor,
    *,
    temperature: Option = 1.0,
    top_k: Option = None,
    top_p: Option = None,
    min_p: Option = None,
) -> torch.Tensor:
    """Return the probabilities that tokens are drawn with, ``[B, V]`` in fp32 (fp64 for fp64 logits)."""
    options = Options(logits_BV, temperature, top_k, top_p, min_p)
    gap_BV = _gaps(logits_BV, options)
    sharp_BV = torch.where(options.noise_B[:, None] > 0, gap_BV, torch.where(gap_BV == 0, 0.0, torch.inf))
    kept_BV = torch.where(_kept(gap_BV, options), (-sharp_BV).exp(), 0.0)
    return kept_BV / kept_BV.sum(-1, keepdim=True)


def sample_reference(
    logits_BV: torch.Tensor,
    *,
    seed: torch.Tensor | int,
    position: torch.Tensor | int = 0,
    temperature: Option = 1.0,
    top_k: Option = None,
    top_p: Option = None,
    min_p: Option = None,
) -> torch.Tensor:
    """Define the result: plain torch, any device and float dtype."""
    options = Options(logits_BV, temperature, top_k, top_p, min_p)
    seed_B, position_B = counters(logits_BV, seed, position)
    gap_BV = _gaps(logits_BV, options)
    token_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
    bits_BV = philox_reference(seed_B[:, None], token_V[None, :], position_B[:, None])
    u_BV = torch.clamp(((bits_BV >> 1).float() + 0.5) * 2.0**-31, max=1 - 2.0**-24)
    series_BV = u_BV * (1.0 + u_BV * (0.5 + u_BV * (1.0 / 3.0)))
    log_e_BV = torch.where(u_BV < 0.01, series_BV, -torch.log(1.0 - u_BV)).log()
    key_BV = torch.where(_kept(gap_BV, options), gap_BV + log_e_BV * options.noise_B[:, None], torch.inf)
    return torch.where(key_BV.isfinite().any(-1), key_BV.argmin(-1), -1)


def philox_reference(seed: torch.Tensor, counter0: torch.Tensor, counter1: torch.Tensor) -> torch.Tensor:
    """Return the first of Philox4x32-10's four words, as int64; the other two counters are 0."""
    mask = 0xFFFFFFFF
    c0, c1, seed = torch.broadcast_tensors(counter0 & mask, counter1 & mask, seed)
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(_PHILOX_ROUNDS):
        # The products wrap around in int64, which changes none of their 64 bits.
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c2 = ((product1 >> 32) & mask) ^ c1 ^ k0, ((product0 >> 32) & mask) ^ c3 ^ k1
        c1, c3 = product1 & mask, product0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0


class Options:
    """The options as one value per row, in the form that both implementations compute with."""

    def __init__(
        self, logits_BV: torch.Tensor, temperature: Option, top_k: Option, top_p: Option, min_p: Option
    ) -> None:
        num_rows, vocab = logits_BV.shape

        def row_values(name: str, value: Option, default: float, low: float, high: float) -> torch.Tensor:
            if isinstance(value, torch.Tensor):
                if value.shape != (num_rows,) or value.device != logits_BV.device:
                    raise ValueError(
                        f"sample: expected {name} [{num_rows}] on {logits_BV.device}, got {list(value.shape)} on "
                        f"{value.device}"
                    )
                return value.float()
            number = default if value is None else value
            if not low <= number <= high:
                raise ValueError(f"sample: {name}={number} is outside of [{low:g}, {high:g}]")
            return torch.full((num_rows,), float(number), device=logits_BV.device)

        temperature_B = row_values("temperature", temperature, 1.0, 0.0, float("inf"))
        self.noise_B = (temperature_B > 0).float()
        self.sharpness_B = torch.where(temperature_B > 0, 1.0 / temperature_B, torch.ones_like(temperature_B))
        self.has_top_k = isinstance(top_k, torch.Tensor) or (top_k or 0) > 0
        top_k_B = row_values("top_k", top_k, 0, 0, MAX_VOCAB)
        # 0 keeps all.
        self.top_k_B = torch.where(top_k_B > 0, top_k_B.clamp(max=vocab), torch.full_like(top_k_B, vocab))
        self.has_top_p = isinstance(top_p, torch.Tensor) or (1.0 if top_p is None else top_p) < 1.0
        self.top_p_B = row_values("top_p", top_p, 1.0, 0.0, 1.0)
        # Not -log(1) = -0, whose bits are those of a negative number.
        self.max_gap_B = row_values("min_p", min_p, 0.0, 0.0, 1.0).log().abs()


def _gaps(logits_BV: torch.Tensor, options: Options) -> torch.Tensor:
    wide_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    return (wide_BV.amax(-1, keepdim=True) - wide_BV) * options.sharpness_B[:, None]


def _kept(gap_BV: torch.Tensor, options: Options) -> torch.Tensor:
    sorted_BV = gap_BV.sort(-1).values
    limit_B1 = sorted_BV.gather(1, (options.top_k_B.long() - 1)[:, None])
    if options.has_top_p:
        mass_BV = torch.where(sorted_BV <= limit_B1, (-sorted_BV).exp(), 0.0).cumsum(-1)
        is_enough_BV = mass_BV >= options.top_p_B[:, None] * mass_BV[:, -1:]
        limit_B1 = torch.minimum(limit_B1, sorted_BV.gather(1, is_enough_BV.int().argmax(-1, keepdim=True)))
    return gap_BV <= torch.minimum(limit_B1, options.max_gap_B[:, None])


def counters(
    logits_BV: torch.Tensor, seed: torch.Tensor | int, position: torch.Tensor | int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, device = logits_BV.shape[0], logits_BV.device
    row_B = torch.arange(num_rows, device=device)
    seed_B = seed.long() if isinstance(seed, torch.Tensor) else row_B + seed
    position_B = position.long() if isinstance(position, torch.Tensor) else torch.full_like(row_B, position)
    if seed_B.shape != (num_rows,) or position_B.shape != (num_rows,):
        raise ValueError(
            f"sample: expected seed and position [{num_rows}], got {list(seed_B.shape)} and {list(position_B.shape)}"
        )
    return seed_B, position_B
