"""Block sizes and warps: a default that each operation explains in code, a measured one per device in ``configs/``.

Nothing is tuned when a module is imported or a kernel launched. ``python -m danaus.kernels.bench --tune`` times the few
candidates that a benchmark case lists and writes what was faster to ``configs/<device>.json``::

    {"rmsnorm": {"D4096": {"num_warps": 8, "num_stages": 1}}}

An operation's keys are its own short words for what its best configuration depends on. The file holds only what beat
the default, so a key that it lacks, like a device without a file, means the default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .launch import is_interpreting

if TYPE_CHECKING:
    from collections.abc import Generator

Config = Mapping[str, int]
"""A kernel's constexprs by name, with ``num_warps`` and ``num_stages`` where they differ from Triton's own."""

CONFIGS = Path(__file__).with_name("configs")

_overrides: dict[str, tuple[Config, set[str]]] = {}
"""By operation: what the tuner tries, and the keys that were asked for since."""


def config_for(op: str, key: str, default: Config) -> dict[str, int]:
    """Return the launch options of ``op`` for ``key``: a copy of the stored ones laid over ``default``.

    Args:
        op: The operation's name in the file.
        key: What the choice depends on, in words of the operation, e.g. ``"d128,causal"``.
        default: What to use where nothing was measured.
    """
    if op not in _overrides:
        return {**default, **_stored(device_name()).get(op, {}).get(key, {})}
    override, asked = _overrides[op]
    asked.add(key)
    return {**default, **override}


@contextmanager
def using(op: str, config: Config) -> Generator[set[str]]:
    """Make ``config`` the one of ``op`` for every key; for the tuner and for tests, in one thread.

    Gives the set of the keys that are asked for within the block.
    """
    before = _overrides.get(op)
    asked: set[str] = set()
    _overrides[op] = (config, asked)
    try:
        yield asked
    finally:
        if before is None:
            del _overrides[op]
        else:
            _overrides[op] = before


def device_name() -> str | None:
    """Return the name of the current GPU's file, e.g. ``"nvidia_h200"``, or None where kernels are interpreted."""
    if is_interpreting() or not torch.cuda.is_available():
        return None
    return _device_name(torch.cuda.current_device())


def store(name: str, op: str, key: str, config: Config | None) -> None:
    """Write ``config`` to the file of device ``name``, or remove what it holds for ``key`` where it is None."""
    stored: dict[str, dict[str, dict[str, int]]] = {op: dict(keys) for op, keys in _stored(name).items()}
    keys = stored.setdefault(op, {})
    keys.pop(key, None)
    if config is not None:
        keys[key] = dict(config)
    kept = {op: dict(sorted(keys.items())) for op, keys in sorted(stored.items()) if keys}
    path = CONFIGS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    _stored.cache_clear()


@cache
def _device_name(index: int) -> str:
    return re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(index).lower()).strip("_")


@cache
def _stored(name: str | None) -> dict[str, dict[str, dict[str, int]]]:
    path = CONFIGS / f"{name}.json"
    if name is None or not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))
