"""Where hosts keep what they are sent."""

from __future__ import annotations

import os
from pathlib import Path


def state_root() -> Path:
    """The user's directory for what outlives jobs: ``DANAUS_STATE_DIR``, else in the user's state directory."""
    chosen = os.environ.get("DANAUS_STATE_DIR")
    if chosen:
        return Path(chosen)
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "danaus"
