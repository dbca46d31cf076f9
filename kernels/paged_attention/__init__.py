"""Attention of new tokens over a paged key/value cache: decode, prefill, and batches that mix them."""

from .api import paged_attention
from .reference import paged_attention_reference, quantize_kv

__all__ = ["paged_attention", "paged_attention_reference", "quantize_kv"]
