"""Draws the next token of each sequence from its logits: temperature, top-k, top-p, min-p."""

from .api import sample
from .reference import Option, kept_reference, philox_reference, sample_reference

__all__ = ["Option", "kept_reference", "philox_reference", "sample", "sample_reference"]
