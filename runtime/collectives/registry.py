"""The process groups of this process: which actor has which, and who hears of the loss of a member."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from ..failure import FailureKind, unpack_failure
from .record import GroupRecord
from .rejoin import rejoin_when_idle

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..failure import MeshFailure
    from ..proc import LocalProc
    from .generation import Generation
    from .groups import Line

_log = logging.getLogger("danaus")

_records: dict[tuple[str, str, str], GroupRecord] = {}
_lock = threading.Lock()
_watching: LocalProc | None = None


def record_for(line: Line, backend: str) -> GroupRecord:
    """Return this process's record of a group, making it at first use."""
    key = line.instance.key, line.address, backend
    with _lock:
        _watch(line.instance.proc_runtime)
        record = _records.get(key)
        if record is None:
            record = _records[key] = GroupRecord(line, backend)
        return record


def record_of(group: Any) -> GroupRecord:
    """Return the record of a group that ``process_group`` gave.

    Raises:
        ValueError: It gave none like that.
    """
    for record in list(_records.values()):
        if record.group is group:
            return record
    raise ValueError(f"{group!r} is no group that process_group() or device_mesh() has made in this process")


def records_of(actor_key: str) -> list[GroupRecord]:
    """Return the groups of an actor."""
    return [record for key, record in list(_records.items()) if key[0] == actor_key]


def _watch(local: LocalProc) -> None:
    global _watching
    if _watching is not local:
        _watching = local
        local.on_gone.append(_on_gone)
        local.on_event["group_broken"] = _on_group_broken


def _on_gone(proc: str, failure: MeshFailure) -> None:
    """A process has died (I/O thread)."""
    _end_generations(lambda _, generation: proc in generation.procs, failure, "")


def _on_group_broken(fields: dict[str, Any]) -> None:
    """A member has left, or ended the generation (I/O thread)."""
    failure = None if fields["failure"] is None else unpack_failure(fields["failure"])

    def is_meant(record: GroupRecord, generation: Generation) -> bool:
        return (record.line.address, generation.number) == (fields["group"], fields["generation"])

    _end_generations(is_meant, failure, fields["reason"])


def _end_generations(
    is_meant: Callable[[GroupRecord, Generation], bool], failure: MeshFailure | None, reason: str
) -> None:
    for record in list(_records.values()):
        generation = record.current
        if generation is not None and is_meant(record, generation):
            generation.end(failure, reason)
            if generation.is_formed:
                rejoin_when_idle(record)


def end_groups(actor_key: str, failure: MeshFailure) -> None:
    """End all groups of an actor (on its thread, after its ``__cleanup__``); ``failure`` says how it ended itself."""
    with _lock:
        ended = [_records.pop(key) for key in list(_records) if key[0] == actor_key]
        is_last = not _records
    for record in reversed(ended):
        try:
            if failure.kind is not FailureKind.STOPPED:
                # Its process lives, so nobody else would tell the others.
                record.break_up(failure, "")
            record.end()
        except Exception:  # noqa: BLE001  the others have to be closed too
            _log.exception("%s could not be closed", record.line.label)
    if ended:
        from .groups import forget_device_meshes

        forget_device_meshes(actor_key)
    if ended and is_last:
        from . import c10d

        c10d.drop_default()
