"""Mixture of experts: routing, the order of the rows, grouped matrix products, and whole SwiGLU experts.

routing.py      ``route``: top-k experts and weights of each token; the losses that keep experts in balance
order.py        ``sort_by_expert``: which row each choice takes, dropless or with a capacity
permutation.py  ``permute``, ``unpermute``: tokens to rows, rows back to tokens
grouped.py      ``grouped_mm``: rows times their expert's matrix, and its gradients
mlp.py          ``moe_mlp``: all of it as one differentiable operator
"""

from .grouped import grouped_mm, grouped_mm_reference
from .mlp import moe_mlp, moe_mlp_reference
from .order import Order, sort_by_expert, sort_by_expert_reference
from .permutation import permute, permute_reference, unpermute, unpermute_reference
from .routing import expert_capacity, load_balancing_loss, route, route_reference, router_z_loss

__all__ = [
    "Order",
    "expert_capacity",
    "grouped_mm",
    "grouped_mm_reference",
    "load_balancing_loss",
    "moe_mlp",
    "moe_mlp_reference",
    "permute",
    "permute_reference",
    "route",
    "route_reference",
    "router_z_loss",
    "sort_by_expert",
    "sort_by_expert_reference",
    "unpermute",
    "unpermute_reference",
]
