"""``ProcMesh.logging_option``: what of the processes' output reaches the terminal, changed while they run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .context import local_proc
from .messages import wire

if TYPE_CHECKING:
    from .mesh import ProcMesh


def apply_logging_option(
    procs: ProcMesh, stream_to_client: bool, aggregate_window_sec: float | None, level: int | str | None
) -> None:
    """Tell the controller's printer, and the processes themselves where the level changes.

    Raises:
        ValueError: The window is negative, or the level has no such name.
    """
    if aggregate_window_sec is not None and not aggregate_window_sec >= 0:
        raise ValueError(
            f"logging_option(aggregate_window_sec={aggregate_window_sec!r}): expected seconds, or None for raw lines"
        )
    local = local_proc()
    fields = {"mesh": procs._mesh_id, "stream": stream_to_client, "window_s": aggregate_window_sec}
    local.send("controller.0", [wire.EVENT, "log_option", fields])
    if level is not None:
        number = logging.getLevelNamesMapping().get(level) if isinstance(level, str) else level
        if not isinstance(number, int):
            raise ValueError(
                f"logging_option(level={level!r}): expected a level of `logging`, as 'INFO' or logging.INFO"
            )
        for proc in procs._proc_ids():
            if proc not in local.gone:
                local.send(proc, [wire.EVENT, "log_level", {"level": number}])
