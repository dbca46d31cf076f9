"""Puts files of a copy in place and removes them, whatever programs have made of the copy meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from typing import TYPE_CHECKING

from .errors import WorkspaceError

if TYPE_CHECKING:
    from pathlib import Path


def place(top: Path, path: str, temporary: str) -> None:
    """Move the file ``temporary`` to ``path`` below ``top``, at once.

    Raises:
        WorkspaceError: A file that did not come from the controller is where a directory has to be, or the reverse.
    """
    _make_parents(top, path)
    full = top / path
    with contextlib.suppress(FileNotFoundError):
        # Compiled code is matched by seconds and size: an edit must not look like what was compiled before.
        before_s = int(os.lstat(full).st_mtime)
        if int(os.lstat(temporary).st_mtime) <= before_s:
            os.utime(temporary, (before_s + 1, before_s + 1), follow_symlinks=False)
    _drop_compiled(full)
    if full.is_dir() and not full.is_symlink():
        shutil.rmtree(full / "__pycache__", ignore_errors=True)
        try:
            full.rmdir()
        except OSError as error:
            raise WorkspaceError(
                f"{full} is a file in the workspace, but a directory here, with files that did not come from there; "
                "move them away"
            ) from error
    os.replace(temporary, full)


def remove(top: Path, path: str) -> None:
    """Remove the file ``path`` below ``top``, what was compiled from it, and the directories that it leaves empty."""
    full = top / path
    parents = [parent for parent in full.parents if parent != top and parent.is_relative_to(top)]
    if any(parent.is_symlink() for parent in parents):
        return
    with contextlib.suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):
        full.unlink()
    _drop_compiled(full)
    for parent in parents:
        with contextlib.suppress(OSError):
            if os.listdir(parent) == ["__pycache__"]:
                shutil.rmtree(parent / "__pycache__")
            parent.rmdir()


def _make_parents(top: Path, path: str) -> None:
    here = top
    for part in path.split("/")[:-1]:
        here /= part
        try:
            mode = os.lstat(here).st_mode
        except FileNotFoundError:
            here.mkdir(mode=0o700)
            continue
        if not stat.S_ISDIR(mode):
            raise WorkspaceError(
                f"{here} is a directory in the workspace, but here it is something that did not come from there; move "
                "it away"
            )


def _drop_compiled(source: Path) -> None:
    if source.suffix == ".py":
        for compiled in (source.parent / "__pycache__").glob(f"{source.stem}.*.pyc"):
            compiled.unlink(missing_ok=True)
