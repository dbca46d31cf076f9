"""What the numbers of a run belong to: device, versions, day."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch


def machine() -> dict[str, str]:
    """Return device, versions and day, as words."""
    has_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_gpu else "no GPU",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "date": datetime.now(tz=UTC).date().isoformat(),
    }


def stamp() -> str:
    """Return the same in one line, for a row of the table."""
    parts = machine()
    return f"{parts['date']}, {parts['device']}, torch {parts['torch']}, triton {parts['triton']}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
