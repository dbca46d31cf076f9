"""Finds the cases: every ``cases_<part>.py`` of this folder offers some."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .case import Case


def all_cases() -> list[Case]:
    """Return the cases of every part, those of a part in its own order.

    Raises:
        ValueError: Two have the same name and shape.
    """
    package = importlib.import_module(__package__ or "")
    modules = [module.name for module in pkgutil.iter_modules(package.__path__) if module.name.startswith("cases_")]
    # What the device attains comes first.
    names = sorted(modules, key=lambda name: (name != "cases_base", name))
    found: list[Case] = []
    for name in names:
        found.extend(importlib.import_module(f".{name}", package.__name__).cases())
    keys = [(case.name, case.shape) for case in found]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ValueError(f"bench: two cases are called {sorted(twice)[0]}; give one another shape or name")
    return found


def choose(cases: Sequence[Case], only: str | None) -> list[Case]:
    """Return the cases whose name begins with one of the words of ``only``, all where it is None.

    Raises:
        ValueError: A word fits none.
    """
    if only is None:
        return list(cases)
    words = [word.strip() for word in only.split(",") if word.strip()]
    for word in words:
        if not any(case.name.startswith(word) for case in cases):
            names = ", ".join(dict.fromkeys(case.name for case in cases))
            raise ValueError(f"--only {word}: no case has that name; there are {names}")
    return [case for case in cases if case.name.startswith(tuple(words))]
