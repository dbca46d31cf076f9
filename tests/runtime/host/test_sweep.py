"""Directories of agents that were killed go when the next one starts; those of living ones, and others, stay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path  # noqa: TC003  pytest's own, in signatures

from danaus.runtime.host.sweep import OWNER, own, sweep


def test_what_a_killed_agent_has_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    living, dead, unknown, reused, other = (
        tmp_path / name for name in ("danaus-living", "danaus-dead", "danaus-x", "danaus-reused", "else")
    )
    for directory in (living, dead, unknown, reused, other):
        directory.mkdir()
    own(str(living))
    code = f"from danaus.runtime.host.sweep import own; own({str(dead)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
    (reused / OWNER).write_text("1 99999999999\n")
    (other / OWNER).write_text("1 99999999999\n")

    sweep(str(tmp_path))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["danaus-living", "danaus-x", "else"]
