"""FlashAttention-2, forward and backward: exact attention in memory that grows with the length, not its square."""

from .api import attention
from .reference import attention_reference

__all__ = ["attention", "attention_reference"]
