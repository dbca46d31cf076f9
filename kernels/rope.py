"""Rotary positions: every pair of elements of a head is turned by an angle that grows with the token's position.

Shapes:  B = sequences, H = heads, T = tokens, E = head width (even), S = positions in the tables.
Math:    halves are rotated (Llama, not interleaved): with i < E/2 and angle a = position * theta**(-2i/E),
         y[i]       = x[i] * cos a - x[i + E/2] * sin a
         y[i + E/2] = x[i + E/2] * cos a + x[i] * sin a,  in fp32, rounded once.
         Backward turns the other way: the same kernel with -sin.
Cost:    memory bound, one read and one write of x. A program takes a few tokens with several heads, so that the tables
         are read once for those heads. Nothing of x is saved for the backward.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch

from .launch import LAUNCH_MAX, Impl, cdiv, check_device, next_power_of_2, tl, triton
from .rows import check_floats
from .tuning import config_for

MAX_HEAD_WIDTH = 1024
"""Widest head that fits the tile of one block beside a few others."""


def rope_reference(
    x_BHTE: torch.Tensor, cos_SE: torch.Tensor, sin_SE: torch.Tensor, positions_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """Define the result: plain torch, any device and float dtype, differentiable in x."""
    half = x_BHTE.shape[-1] // 2
    cos, sin = cos_SE[:, :half], sin_SE[:, :half]
    if positions_BT is None:
        cos, sin = cos[: x_BHTE.shape[2]], sin[: x_BHTE.shape[2]]
    else:
        # A head dim of one: the same angle for all of them.
        cos, sin = cos[positions_BT].unsqueeze(-3), sin[positions_BT].unsqueeze(-3)
    wide = torch.promote_types(x_BHTE.dtype, torch.float32)
    first, second = x_BHTE.to(wide).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_BHTE.dtype)


@triton.jit
def _rope_kernel(
    x_ptr,
    y_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    x_stride_b,
    x_stride_h,
    x_stride_t,
    y_stride_b,
    y_stride_h,
    y_stride_t,
    positions_stride,
    cos_stride,
    sin_stride,
    num_heads,
    num_tokens,
    head_blocks,
    token_blocks,
    half,
    HAS_POSITIONS: tl.constexpr,
    BACKWARD: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    # Heads run fastest: where they are neighbours in memory, so are the programs that read them.
    program = tl.program_id(0)
    head_block = program % head_blocks
    token_block = (program // head_blocks) % token_blocks
    batch = (program // head_blocks // token_blocks).to(tl.int64)
    row_R = tl.arange(0, TOKENS * HEADS)
    token_R = (token_block * TOKENS + row_R // HEADS).to(tl.int64)
    head_R = (head_block * HEADS + row_R % HEADS).to(tl.int64)
    col_E = tl.arange(0, HALF)
    inside_R = (token_R < num_tokens) & (head_R < num_heads)
    mask_RE = inside_R[:, None] & (col_E < half)[None, :]
    position_R = token_R
    if HAS_POSITIONS:
        position_R = tl.load(positions_ptr + batch * positions_stride + token_R, mask=inside_R, other=0).to(tl.int64)
    cos_RE = tl.load(cos_ptr + position_R[:, None] * cos_stride + col_E[None, :], mask=mask_RE, other=0.0)
    sin_RE = tl.load(sin_ptr + position_R[:, None] * sin_stride + col_E[None, :], mask=mask_RE, other=0.0)
    cos_RE = cos_RE.to(tl.float32)
    sin_RE = sin_RE.to(tl.float32)
    if BACKWARD:
        sin_RE = -sin_RE
    x_RE = x_ptr + (batch * x_stride_b + head_R * x_stride_h + token_R * x_stride_t)[:, None] + col_E[None, :]
    first_RE = tl.load(x_RE, mask=mask_RE, other=0.0).to(tl.float32)
    second_RE = tl.load(x_RE + half, mask=mask_RE, other=0.0).to(tl.float32)
    y_RE = y_ptr + (batch * y_stride_b + head_R * y_stride_h + token_R * y_stride_t)[:, None] + col_E[None, :]
    dtype = y_ptr.dtype.element_ty
    tl.store(y_RE, (first_RE * cos_RE - second_RE * sin_RE).to(dtype), mask=mask_RE)
    tl.store(y_RE + half, (second_RE * cos_RE + first_RE * sin_RE).to(dtype), mask=mask_RE)


def rope_config(num_heads: int, head_width: int) -> dict[str, int]:
    """Return the default tile: up to 16 heads, and tokens until there are 16 elements of each half for a thread."""
    half = next_power_of_2(head_width // 2)
    heads = min(next_power_of_2(num_heads), 16)
    return {"TOKENS": max(1, min(2048 // (heads * half), 16)), "HEADS": heads, "num_warps": 4}


def _launch(
    x: torch.Tensor,
    y: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    *,
    backward: bool,
) -> None:
    if not x.numel():
        return
    num_sequences, num_heads, num_tokens, width = x.shape
    config = config_for("rope", f"E{width},H{num_heads}", rope_config(num_heads, width))
    head_blocks, token_blocks = cdiv(num_heads, config["HEADS"]), cdiv(num_tokens, config["TOKENS"])
    programs = num_sequences * head_blocks * token_blocks
    if programs > LAUNCH_MAX:
        raise ValueError(f"rope: {programs} tiles, a launch takes {LAUNCH_MAX}: split the batch")
    if positions is not None:
        positions = positions.contiguous()
    _rope_kernel[(programs,)](
        x,
        y,
        cos,
        sin,
        positions,
        *x.stride()[:3],
        *y.stride()[:3],
        num_tokens if positions is not None and positions.ndim == 2 else 0,
        cos.stride(0),
        sin.stride(0),
        num_heads,
        num_tokens,
        head_blocks,
        token_blocks,
        width // 2,
        HAS_POSITIONS=positions is not None,
        BACKWARD=backward,
        HALF=next_power_of_2(width // 2),
        **config,
    )


def _last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("danaus::rope", mutates_args=())
def _rope_op(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None, backward: bool
) -> torch.Tensor:
    y = _rope_fake(x, cos, sin, positions, backward)
    _launch(
        _last_dim_contiguous(x),
        y,
        _last_dim_contiguous(cos),
        _last_dim_contiguous(sin),
        positions,
        backward=backward,
    )
    return y


@_rope_op.register_fake
def _rope_fake(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None, backward: bool
) -> torch.Tensor:
    """Heads beside or within tokens, as in ``x``: what follows then needs no copy."""
    del cos, sin, positions, backward
    num_sequences, num_heads, num_tokens, width = x.shape
    if x.is_contiguous():
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    tokens_first = (num_sequences, num_tokens, num_heads, width)
    return torch.empty(tokens_first, dtype=x.dtype, device=x.device).transpose(1, 2)


@torch.library.custom_op("danaus::rope_", mutates_args={"x"})
def _rope_inplace_op(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None) -> None:
    _launch(x, x, _last_dim_contiguous(cos), _last_dim_contiguous(sin), positions, backward=False)


@_rope_inplace_op.register_fake
def _rope_inplace_fake(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None) -> None:
    del x, cos, sin, positions


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    _, cos, sin, positions, ctx.backward_angle = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
    cos, sin, positions = ctx.saved_tensors
    return _rope_op(dy, cos, sin, positions, not ctx.backward_angle), None, None, None, None


_rope_op.register_autograd(_backward, setup_context=_setup_context)


def rope(
    x_BHTE: torch.Tensor,
    cos_SE: torch.Tensor,
    sin_SE: torch.Tensor,
    positions_BT: torch.Tensor | None = None,
    *,
    inplace: bool = False,
    impl: Impl = "triton",
) -> torch.Tensor:
    """Turn every head by its token's position; same result as :func:`rope_reference`.

    Args:
        x_BHTE: ``[B, H, T, E]`` fp32, bf16 or fp16, E even, up to 1024; any strides (``[B, T, H, E]`` transposed, or
            ``[1, H, T, E]`` for packed sequences), a last dim that is not contiguous is copied.
        cos_SE: ``[S, E/2]``, or ``[S, E]`` of which the second half repeats the first, as Llama's tables are. Not
            differentiated.
        sin_SE: Of the same shape.
        positions_BT: ``[B, T]`` or ``[T]`` integers below S: the row of the tables for each token. Not checked on a
            GPU. Default: row t for token t.
        inplace: Write to ``x_BHTE`` itself and return it; only where no gradient is recorded.
        impl: Who computes it. torch has no such function of its own.

    Returns:
        Shape and dtype of ``x_BHTE``. The layout is ``x_BHTE``'s where that is contiguous, else tokens before heads.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; the message says what would.
    """
    check_device("rope", impl, x_BHTE, cos_SE, sin_SE, positions_BT, choices=("reference", "triton"))
    _check_shapes(x_BHTE, cos_SE, sin_SE, positions_BT)
    if inplace:
        _check_inplace(x_BHTE)
    if impl == "reference":
        y = rope_reference(x_BHTE, cos_SE, sin_SE, positions_BT)
        return x_BHTE.copy_(y) if inplace else y
    check_floats("rope", x=x_BHTE, cos=cos_SE, sin=sin_SE)
    if not inplace:
        return _rope_op(x_BHTE, cos_SE, sin_SE, positions_BT, False)
    _rope_inplace_op(x_BHTE, cos_SE, sin_SE, positions_BT)
    return x_BHTE


def _check_shapes(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None) -> None:
    if x.ndim != 4 or x.shape[-1] % 2 or not 2 <= x.shape[-1] <= MAX_HEAD_WIDTH:
        raise ValueError(f"rope: expected x [B, H, T, E] with E even, 2 to {MAX_HEAD_WIDTH}, got {list(x.shape)}")
    num_sequences, _, num_tokens, width = x.shape
    if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[1] not in {width // 2, width}:
        raise ValueError(
            f"rope: expected cos and sin [S, {width // 2}] or [S, {width}], got {list(cos.shape)}, {list(sin.shape)}"
        )
    if positions is None:
        if cos.shape[0] < num_tokens:
            raise ValueError(f"rope: {num_tokens} tokens, but the tables end at {cos.shape[0]}: make longer ones")
        return
    if positions.shape not in {(num_tokens,), (num_sequences, num_tokens)} or positions.is_floating_point():
        raise ValueError(
            f"rope: expected integer positions [{num_tokens}] or [{num_sequences}, {num_tokens}], got "
            f"{list(positions.shape)} {positions.dtype}"
        )


def _check_inplace(x: torch.Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("rope: inplace=True records no gradient, but x requires one: leave it out")
    if x.stride(-1) != 1:
        raise ValueError(f"rope: inplace=True needs a contiguous last dim, got strides {x.stride()}")
