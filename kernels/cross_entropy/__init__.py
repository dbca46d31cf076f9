"""Cross entropy of logits, and of ``x @ weight.T`` without ever holding the logits."""

from .linear import linear_cross_entropy, linear_cross_entropy_reference
from .plain import cross_entropy, cross_entropy_reference

__all__ = [
    "cross_entropy",
    "cross_entropy_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
]
