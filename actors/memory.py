"""How much memory a rank uses: of its GPU where it has one, else of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def memory_bytes(device: torch.device) -> int:
    """Return the most that was allocated on a GPU so far; for the CPU, this process's proportional share of RAM now.

    The share counts a page that n processes have in common as a page/n, so that ranks forked from one process add up.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    except (OSError, StopIteration):
        # sandboxed kernels lack that file: resident pages, shared ones in full
        resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return resident * os.sysconf("SC_PAGE_SIZE")
