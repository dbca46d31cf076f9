"""Sizes for readers."""

from __future__ import annotations


def human_bytes(size: float) -> str:
    """Return ``size`` with a unit, as in ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
