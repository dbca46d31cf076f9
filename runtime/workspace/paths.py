"""Where a path of the controller's working directory lies on another host.

An order for processes carries, for each workspace, its id, where it was sent from, and what directories inside of it
are called on the ordering host. The host that carries the order out makes a map from directory to directory of that,
and rewrites the search path and the working directory by it.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import socket
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from ..config import state_root

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping, Sequence
    from pathlib import Path

    from ..proc import LocalProc
    from .scan import Limits

COPY: Final = "copy"
"""Folder of the files themselves, beside what is noted about them."""
ROOT_FILE: Final = "root"
"""File that names what the copy holds, for those who key something by it."""

_hidden: ContextVar[bool] = ContextVar("danaus_no_workspaces", default=False)
_known: WeakKeyDictionary[LocalProc, dict[str, Workspace]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Workspace:
    """A directory that was sent to hosts.

    Attributes:
        workspace_id: Names it on every host.
        home: The directory on the host that it was sent from.
        home_slot: That host.
        here: The directory on the host of this process, with every link resolved.
        ignore: Rules of what not to send, besides those of the directory's files.
        limits: How much may be sent.
    """

    workspace_id: str
    home: str
    home_slot: int
    here: str
    ignore: tuple[str, ...] = ()
    limits: Limits | None = None

    @property
    def is_sent_from_here(self) -> bool:
        """Whether this process's host is the one that it was sent from."""
        return self.here == self.home

    def pack(self, paths: Iterable[str]) -> list[Any]:
        """Return it as an order carries it.

        Args:
            paths: What is to be found on other hosts, as this process calls it: some may lead there through links.
        """
        inside = {self.here: ""}
        for path in filter(os.path.isabs, paths):
            relative = os.path.relpath(os.path.realpath(path), self.here)
            if relative != ".." and not relative.startswith("../"):
                inside[path] = "" if relative == "." else relative
        return [self.workspace_id, self.home, self.home_slot, inside]


def workspace_of(directory: str, *, slot: int) -> Workspace:
    """Name the workspace of a directory on this host, which is ``slot`` of the job."""
    home = os.path.realpath(directory)
    origin = f"{_user()}@{socket.gethostname()}:{home}"
    digest = hashlib.blake2b(os.fsencode(origin), digest_size=6).hexdigest()
    return Workspace(f"{_slug(os.path.basename(home))}-{digest}", home, slot, home)


def packed_workspaces(local: LocalProc, paths: Iterable[str]) -> list[Any]:
    """What an order of ``local`` carries of workspaces; nothing inside of :func:`no_workspaces`."""
    if _hidden.get():
        return []
    paths = list(paths)
    return [workspace.pack(paths) for workspace in workspaces_of(local).values()]


@contextmanager
def no_workspaces() -> Generator[None]:
    """Have processes that are spawned inside start where hosts have no copy yet."""
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


def workspaces_of(local: LocalProc) -> dict[str, Workspace]:
    """What this process knows to have been sent, by id: the processes that it spawns find their code there."""
    return _known.setdefault(local, {})


def inherit(local: LocalProc, packed: Sequence[Sequence[Any]], mapped: Mapping[str, str]) -> None:
    """Have ``local`` know what it was ordered with, as it lies on its own host; see :func:`path_map`."""
    for workspace_id, home, home_slot, inside in packed:
        for name, relative in inside.items():
            if not relative and name in mapped:
                here = os.path.realpath(mapped[name])
                workspaces_of(local)[workspace_id] = Workspace(workspace_id, home, home_slot, here)


def workspace_directory(workspace_id: str, host: str) -> Path:
    """Where the host ``host``, which this process is on, keeps what belongs to a workspace."""
    # Hosts that share their users' directories each have a copy of their own.
    return state_root() / "workspaces" / _slug(host) / _slug(workspace_id)


def copy_directory(workspace_id: str, host: str) -> str:
    """The copy of a workspace on ``host``, which this process is on; it need not exist."""
    return str(workspace_directory(workspace_id, host) / COPY)


def path_map(packed: Sequence[Sequence[Any]], *, host: str, slot: int) -> dict[str, str]:
    """Return where the directories of an order lie on this host, by what they are called on the host that ordered.

    Args:
        packed: What :meth:`Workspace.pack` made of each.
        host: Name of this host.
        slot: This host's number in the job.
    """
    found: dict[str, str] = {}
    for workspace_id, home, home_slot, inside in packed:
        here = home if slot == home_slot else copy_directory(workspace_id, host)
        # Without a copy, a host that shares the controller's files finds them where they are.
        if os.path.isdir(here):
            found.update(
                (name, os.path.join(here, relative) if relative else here) for name, relative in inside.items()
            )
    return found


def map_path(path: str, mapped: Mapping[str, str]) -> str:
    """Return ``path`` as it is called here; unchanged where it lies in none of the directories."""
    best = ""
    for there in mapped:
        if len(there) > len(best) and (path == there or path.startswith(there.rstrip("/") + "/")):
            best = there
    return mapped[best] + path[len(best.rstrip("/")) :].rstrip("/") if best else path


def map_sys_path(theirs: Sequence[str], mapped: Mapping[str, str], *, own: Sequence[str] | None) -> list[str]:
    """Return the search path for a process that was ordered with ``theirs``.

    Args:
        theirs: Search path of who ordered.
        mapped: See :func:`path_map`.
        own: This host's own search path, where that is another host: what is installed here comes before what happens
            to be found at the places of the other, and after the workspace. None on the ordering host.
    """
    if own is None:
        return [map_path(entry, mapped) for entry in theirs]
    there = [(entry, map_path(entry, mapped)) for entry in theirs]
    first = [here for entry, here in there if not os.path.isabs(entry) or here != entry]
    last = [here for entry, here in there if os.path.isabs(entry) and here == entry and os.path.exists(here)]
    return list(dict.fromkeys([*first, *own, *last]))


def _slug(name: str) -> str:
    """``name`` as one part of a path."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[:80] or "_"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # Containers run as users that no file knows.
        return str(os.getuid())
