"""What actors want to have back when they are started again: handed to the host agent, which outlives them."""

from __future__ import annotations

import itertools
import os
import pickle
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import cloudpickle

from .context import current_instance
from .errors import DanausError
from .messages import wire

if TYPE_CHECKING:
    from .proc import LocalProc

MAX_KEPT_BYTES: Final = 64 << 20
"""Largest state that an agent keeps in its memory, for one actor."""

ANSWER_S: Final = 30.0
"""How long the agent may take to answer."""

_tokens = itertools.count(1)
_waits: dict[int, _Wait] = {}


class _Wait:
    def __init__(self) -> None:
        self.answered = threading.Event()
        self.state: bytes | None = None


def checkpoint(state: object, *, path: str | os.PathLike[str] | None = None) -> None:
    """Keep ``state`` for this actor: if it is started again, its ``restore(state)`` is called after ``__init__``.

    Only the last state is kept. When this returns, it is safe from the death of this process: the host's agent has it
    in memory, and with ``path`` it is on disk as well. Blocks for that: some 100 us for a small state.

    Args:
        state: Anything that can be pickled; pickled at once, so later changes are not seen.
        path: Folder for a file of this rank's, which also outlives the host agent. Written beside and moved into place.

    Raises:
        RuntimeError: Called outside of an actor.
        TypeError: ``state`` cannot be pickled; what was kept before stays.
        ValueError: ``state`` is larger than an agent keeps, and no ``path`` is given.
        OSError: The file cannot be written; what was kept before stays.
    """
    instance = current_instance()
    if instance.mesh is None:
        raise RuntimeError("checkpoint(): this code runs outside of an actor; call it in an endpoint or in __init__")
    data = _dumps(state)
    kept = b"s" + data
    local = instance.proc_runtime
    if path is not None:
        file = _write(Path(path), f"{instance.name}.{instance.rank.rank}", data)
        where = {"actor": instance.key, "proc": local.proc_id, "file": file}
        local.send(local.actors[instance.key].owner, [wire.EVENT, "kept_on_disk", where])
        if len(data) > MAX_KEPT_BYTES:
            kept = b"f" + os.fsencode(file)
    elif len(data) > MAX_KEPT_BYTES:
        size_mib, most_mib = len(data) >> 20, MAX_KEPT_BYTES >> 20
        raise ValueError(f"checkpoint(): the state takes {size_mib} MiB, an agent keeps {most_mib}; give a path=")
    _ask(local, "keep", {"actor": instance.key, "state": kept})


def recall(local: LocalProc, key: str) -> tuple[bool, Any]:
    """Return whether there is a state for the actor ``key`` of this place, and the state; runs user code."""
    kept = _ask(local, "recall", {"actor": key})
    if kept is None:
        file = local.actors[key].kept_file
        if file is None:
            return False, None
        kept = b"f" + os.fsencode(file)
    data = kept[1:] if kept[:1] == b"s" else Path(os.fsdecode(kept[1:])).read_bytes()
    return True, pickle.loads(data)  # noqa: S301  written by this actor, in a file or an agent of this job


def _ask(local: LocalProc, name: str, fields: dict[str, Any]) -> bytes | None:
    """Put a question to the agent and wait for the answer."""
    token, wait = next(_tokens), _Wait()
    _waits[token] = wait
    local.on_event.setdefault("kept", _on_kept)
    try:
        local.request(name, {**fields, "token": token})
        if not wait.answered.wait(ANSWER_S):
            raise DanausError(f"{name}: the host agent has not answered within {ANSWER_S:g} s")
    finally:
        del _waits[token]
    return wait.state


def _on_kept(fields: dict[str, Any]) -> None:
    wait = _waits.get(fields["token"])
    if wait is not None:
        wait.state = fields["state"]
        wait.answered.set()


def _dumps(state: object) -> bytes:
    try:
        try:
            return pickle.dumps(state, protocol=5)
        except (pickle.PicklingError, AttributeError, TypeError):
            return cloudpickle.dumps(state, protocol=5)
    except Exception as error:
        raise TypeError(
            f"checkpoint(): {type(state).__qualname__} cannot be pickled ({type(error).__name__}: {error}); "
            "hand over plain data, arrays or tensors. What was kept before stays"
        ) from error


def _write(folder: Path, name: str, data: bytes) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.absolute() / f"{name}.checkpoint"
    beside = path.with_suffix(f".{os.getpid()}.new")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return str(path)
