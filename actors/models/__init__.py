"""Plain torch models that actors host. They know nothing of the runtime."""

from .cache import KVCache
from .generate import generate, new_cache
from .llama import Llama, LlamaConfig, RMSNorm, base, next_token_loss, small, tiny

__all__ = [
    "KVCache",
    "Llama",
    "LlamaConfig",
    "RMSNorm",
    "base",
    "generate",
    "new_cache",
    "next_token_loss",
    "small",
    "tiny",
]
