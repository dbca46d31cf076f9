"""Sums gradients over the ranks of a group in a few large buckets, while backward still runs.

The gradients of a bucket's weights are views of one flat buffer, so nothing is copied before or after the sum. Buckets
are filled and sent in reverse order of the weights, which is about the order in which backward ends, and always in that
order: a bucket that is ready early waits for those before it, so that every rank starts the same collectives in turn.

Torch's DistributedDataParallel does the same, but keeps the C++ group that it was made with and cannot be put right
once a collective has failed half-way. Here the group is an argument of each step, and :meth:`GradientBuckets.begin`
starts afresh.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable


class _Bucket:
    """One flat buffer, and the weights whose gradients are views of it."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights
        self.flat = torch.zeros(sum(w.numel() for w in weights), dtype=weights[0].dtype, device=weights[0].device)
        parts = self.flat.split([w.numel() for w in weights])
        self.views = [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
        self.missing = len(weights)


class GradientBuckets:
    """The gradients of a set of weights, and their sum over a group.

    Use: :meth:`begin`, then ``backward`` of each micro-batch with :meth:`send_during` called before the last one, then
    :meth:`finish`. One thread, except that backward may run the hooks on threads of its own, one after the other.
    """

    def __init__(self, weights: Iterable[nn.Parameter], *, bucket_bytes: int = 4 << 20) -> None:
        self._buckets = [_Bucket(group) for group in _grouped(list(weights)[::-1], bucket_bytes)]
        self._group: Any = None
        self._sending = False
        self._next = 0
        self._works: list[Any] = []
        for bucket in self._buckets:
            for weight in bucket.weights:
                weight.register_post_accumulate_grad_hook(partial(self._on_gradient, bucket))

    @property
    def num_buckets(self) -> int:
        """Number of collectives per step."""
        return len(self._buckets)

    def begin(self) -> None:
        """Set all gradients to zero, once what an earlier step left unfinished no longer writes to them."""
        while self._works:
            with suppress(Exception):
                self._works.pop(0).wait()
        self._sending, self._next = False, 0
        for bucket in self._buckets:
            bucket.flat.zero_()
            bucket.missing = len(bucket.weights)
            for weight, view in zip(bucket.weights, bucket.views, strict=True):
                weight.grad = view

    def send_during(self, group: dist.ProcessGroup | None) -> None:
        """Say that the next backward is the step's last: each bucket is summed over ``group`` once it is complete.

        Args:
            group: Ranks to sum over; None for this rank alone.
        """
        self._group, self._sending = group, True

    def finish(self) -> None:
        """Send what backward has not reached (weights that took no part), and wait for all sums.

        Raises:
            RuntimeError: A collective failed; the gradients are of no use, the weights as they were.
        """
        while self._next < len(self._buckets):
            self._send_next()
        self._sending = False
        while self._works:
            self._works.pop(0).wait()

    def _on_gradient(self, bucket: _Bucket, _weight: Tensor) -> None:
        if not self._sending:
            return
        bucket.missing -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        if self._group is not None:
            self._works.append(dist.all_reduce(bucket.flat, group=self._group, async_op=True))


def _grouped(weights: list[nn.Parameter], bucket_bytes: int) -> Iterable[list[nn.Parameter]]:
    """Cut ``weights`` into runs of one dtype and device of at most ``bucket_bytes``, or of one weight."""
    run: list[nn.Parameter] = []
    size = 0
    for weight in weights:
        alike = bool(run) and (run[0].dtype, run[0].device) == (weight.dtype, weight.device)
        if run and (not alike or size + weight.nbytes > bucket_bytes):
            yield run
            run, size = [], 0
        run.append(weight)
        size += weight.nbytes
    if run:
        yield run
