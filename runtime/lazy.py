"""Imports names when they are first asked for: what most scripts do not use costs them no time at their start."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def late(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package.

    Args:
        package: Its name.
        places: Name to the module that it is in, relative to the package; the module itself where both are the same.
    """

    def find(name: str) -> Any:
        place = places.get(name)
        if place is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(place, package)
        value = module if place.rpartition(".")[2] == name else getattr(module, name)
        # Found without this function from now on.
        setattr(sys.modules[package], name, value)
        return value

    return find
