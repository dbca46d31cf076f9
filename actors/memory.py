"""How much memory a rank uses: of its GPU where it has one, else of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch


class MemoryMeter:
    """Reads the memory in use, at most once per ``every_s``: a reading of the kernel's page tables takes milliseconds.

    Args:
        device: GPU: the most that was allocated on it so far. CPU: this process's proportional share of RAM now, which
            counts a page that n processes have in common as a page/n, so that ranks forked from one process add up.
        every_s: Age up to which a reading is good enough.
    """

    def __init__(self, device: torch.device, *, every_s: float = 1.0) -> None:
        self._device, self._every_s = device, every_s
        self._read_at_s = float("-inf")
        self._bytes = 0

    def read_bytes(self, *, now_s: float) -> int:
        """Return the memory in use, as of now or a little earlier."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if now_s - self._read_at_s >= self._every_s:
            self._bytes, self._read_at_s = proportional_bytes(), now_s
        return self._bytes


def proportional_bytes() -> int:
    """Return this process's proportional share of RAM; where the kernel does not tell, its resident pages in full."""
    try:
        rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    except (OSError, StopIteration):
        resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return resident * os.sysconf("SC_PAGE_SIZE")
