"""Times the few configurations that a case lists and keeps what beats the default; see :mod:`..tuning`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from ..tuning import device_name, store, using
from .measure import check, time_us
from .rows import OURS

if TYPE_CHECKING:
    from ..tuning import Config
    from .case import Case

WORTH = 0.98
"""A configuration is kept if it takes less than this part of the default's time; less is noise."""


def tune(case: Case) -> None:
    """Write the best configuration of the case to the file of this GPU; a case without candidates is left alone."""
    name = device_name()
    if case.tune is None or name is None:
        return
    # An empty configuration is the default, whatever is stored.
    default_us = _time(case, {})
    best: Config | None = None
    best_us = default_us * WORTH
    for candidate in case.tune.candidates:
        candidate_us = _time(case, candidate)
        _say(case, candidate, candidate_us, default_us)
        if candidate_us < best_us:
            best, best_us = candidate, candidate_us
    store(name, case.tune.op, case.tune.key, best)


def _time(case: Case, config: Config) -> float:
    """Return the time, infinite for a configuration that does not fit the GPU or computes something else."""
    assert case.tune is not None
    device = torch.device("cuda")
    with using(case.tune.op, config) as asked:
        if check(case, device, variants=(OURS,)):
            return float("inf")
        try:
            took_us = time_us(case, case.variants[OURS], device)
        except Exception as error:  # noqa: BLE001  too much shared memory, too many registers
            print(f"  {dict(config)}: {type(error).__name__}", file=sys.stderr)
            return float("inf")
    if case.tune.key not in asked:
        raise ValueError(f"{case.name}: tunes {case.tune.op} for {case.tune.key!r}, its calls ask for {sorted(asked)}")
    return took_us


def _say(case: Case, config: Config, candidate_us: float, default_us: float) -> None:
    words = ", ".join(f"{name}={value}" for name, value in config.items())
    print(f"  {case.name}: {words}: {candidate_us:.1f} us (default {default_us:.1f})", file=sys.stderr, flush=True)
