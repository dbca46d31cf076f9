"""Says what code a zygote would preload on this host, without importing any of it.

A module that lies in a workspace's copy stands for the whole copy: what it imports in turn lies there, too. So an edit
of any file there gets processes a new zygote. Of other modules the place, the time of the last change and the size
count.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from .paths import COPY, ROOT_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def preload_key(base: str, modules: Sequence[str], sys_path: Sequence[str], tops: Iterable[str]) -> str:
    """Name the zygote that has imported ``modules`` as they are on this host now.

    Args:
        base: What else tells zygotes apart; kept where there are no modules.
        modules: Full names.
        sys_path: Where they are looked for, as the processes will do.
        tops: Directories of workspaces on this host.
    """
    if not modules:
        return base
    importlib.invalidate_caches()
    copies = {top: _root_of(top) for top in tops}
    digest = hashlib.blake2b(base.encode(), digest_size=8)
    for module in modules:
        origin = find_origin(module, sys_path)
        digest.update(f"\n{module} {origin}".encode(errors="surrogateescape"))
        held_by = next((top for top, root in copies.items() if root and _is_inside(origin, top)), None)
        if held_by is not None:
            digest.update(copies[held_by].encode())
        elif origin:
            try:
                status = os.stat(origin)
            except OSError:
                continue
            digest.update(f" {status.st_mtime_ns} {status.st_size}".encode())
    return digest.hexdigest()


def find_origin(module: str, sys_path: Sequence[str]) -> str:
    """Return the file of a module; empty where there is none, or something else than a path finds it."""
    places: Sequence[str] | None = list(sys_path)
    name, origin = "", ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        if places is None:
            return ""
        try:
            spec = PathFinder.find_spec(name, places)
        except (ImportError, ValueError, OSError):
            return ""
        if spec is None:
            return ""
        locations = spec.submodule_search_locations
        # A folder without __init__.py has no file, and finds its places again by importing what is above it.
        places = None if locations is None else list(getattr(locations, "_path", locations))
        origin = spec.origin or (places[0] if places else "")
    return origin


def _root_of(top: str) -> str:
    """The hash of what the copy at ``top`` holds; empty for a directory that is no copy."""
    place = Path(top)
    if place.name != COPY:
        return ""
    try:
        return (place.parent / ROOT_FILE).read_text()
    except OSError:
        return ""


def _is_inside(path: str, top: str) -> bool:
    return bool(path) and path.startswith(top.rstrip("/") + "/")
