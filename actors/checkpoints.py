"""Checkpoints on disk: written by ``torch.distributed.checkpoint``, complete or not there at all.

    directory/step-00000200/            tensors, and manifest.json with step and identity of the run
    directory/step-00000300.part-1f2e/  being written, or left by a writer that died

A checkpoint is written beside its place, flushed to disk and renamed into it. One process at a time writes to a
directory.

Replicas are equal, so one rank writes for all, without a collective. (Torch coordinates several writers through the
default process group only: where there is none, torch 2.13 ignores the ``process_group=`` that it is given.)
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.testing import point

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_MANIFEST = "manifest.json"
_COMPLETE = re.compile(r"step-(\d{8,})")
_PARTIAL = re.compile(r"step-\d{8,}\.part-[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What can be known of a checkpoint without reading its tensors.

    Attributes:
        step: Number of completed steps.
        identity: What the course of the run depends on, as JSON knows it.
        metrics: What was reported of the last of these steps; None where there is none.
    """

    step: int
    identity: Mapping[str, Any]
    metrics: Mapping[str, Any] | None = None

    def differences(self, identity: Mapping[str, Any]) -> list[str]:
        """Return what is not as in ``identity``, as ``"optimizer.peak_lr is 0.1 there and 0.2 here"``."""
        there, here = _flat(self.identity), _flat(identity)
        names = [*here, *(name for name in there if name not in here)]
        return [
            f"{name} is {there.get(name)} there and {here.get(name)} here"
            for name in names
            if there.get(name) != here.get(name)
        ]


def list_checkpoints(directory: str | Path) -> list[Path]:
    """Return the complete checkpoints in ``directory``, oldest step first; none where there is no such directory."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _COMPLETE.fullmatch(path.name) and (path / _MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest_checkpoint(directory: str | Path) -> Path | None:
    """Return the complete checkpoint of the highest step, or None."""
    found = list_checkpoints(directory)
    return found[-1] if found else None


def newest_step(directory: str | Path) -> int:
    """Return the step of the newest complete checkpoint in ``directory``, 0 where there is none."""
    newest = newest_checkpoint(directory)
    return 0 if newest is None else int(newest.name.removeprefix("step-"))


def checkpoint_path(directory: str | Path, step: int) -> Path:
    """Return where the checkpoint of a step lies, or would lie."""
    return Path(directory) / f"step-{step:08d}"


def read_manifest(path: str | Path) -> Manifest:
    """Read step and identity of a checkpoint.

    Raises:
        FileNotFoundError: ``path`` is no complete checkpoint; the message names those beside it.
    """
    path = Path(path)
    try:
        return Manifest(**json.loads((path / _MANIFEST).read_text()))
    except FileNotFoundError as error:
        beside = ", ".join(str(other) for other in list_checkpoints(path.parent)) or "none"
        raise FileNotFoundError(f"{path} is no complete checkpoint; those beside it: {beside}") from error


def save_checkpoint(directory: str | Path, tensors: Mapping[str, Tensor], manifest: Manifest, *, keep: int = 3) -> Path:
    """Write a checkpoint, then remove all but the newest ``keep`` and whatever unfinished ones there are.

    Blocks until the checkpoint is on disk. One of the same step is replaced.

    Returns:
        The checkpoint's path.

    Raises:
        ValueError: ``keep`` is below 1.
        OSError: It could not be written; earlier checkpoints are as they were.
    """
    if keep < 1:
        raise ValueError(f"save_checkpoint: keep={keep} would remove the checkpoint just written; use 1 or more")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    final = checkpoint_path(directory, manifest.step)
    part = _part_name(final)
    try:
        _write(part, tensors, manifest)
        if final.exists():
            final.rename(_part_name(final))
        part.rename(final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _flush(directory)
    _prune(directory, keep)
    return final


def load_checkpoint(path: str | Path, tensors: Mapping[str, Tensor]) -> Manifest:
    """Read a checkpoint into ``tensors``, in place, on whatever device these lie.

    Raises:
        FileNotFoundError: ``path`` is no complete checkpoint.
        ValueError: It lacks one of ``tensors``, or has it in another shape. Some tensors may have been overwritten.
    """
    manifest = read_manifest(path)
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        _single_process(lambda: load(dict(tensors), checkpoint_id=str(path), no_dist=True))
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this state: {_last_line(error)}") from error
    return manifest


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return flat


def _write(part: Path, tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = FileSystemWriter(part, sync_files=True)
    _single_process(lambda: save(dict(tensors), storage_writer=writer, no_dist=True))
    point("checkpoint", step=manifest.step)
    with (part / _MANIFEST).open("w") as file:
        json.dump(asdict(manifest), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _flush(part)


def _single_process(action: Callable[[], object]) -> None:
    """Run ``action`` without the warning that torch gives for ``no_dist=True``, which is what we mean."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        action()


def _prune(directory: Path, keep: int) -> None:
    for old in list_checkpoints(directory)[:-keep]:
        # first out of sight, so that nobody finds one that is half removed
        old.rename(_part_name(old))
    for path in directory.iterdir():
        if _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _part_name(final: Path) -> Path:
    return final.with_name(f"{final.name}.part-{secrets.token_hex(4)}")


def _flush(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _last_line(error: BaseException) -> str:
    return str(error).strip().rsplit("\n", 1)[-1]
