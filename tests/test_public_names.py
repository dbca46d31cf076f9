"""What a folder's ``__all__`` lists is what it offers, no less and no more."""

from __future__ import annotations

import importlib
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("actors", "kernels", "programs", "runtime", "tools")
NEEDS_TORCH = ("actors", "kernels", "programs")


def packages() -> list[object]:
    """The name of every folder with code, marked where importing it takes torch."""
    found: list[object] = ["danaus"]
    for folder in FOLDERS:
        marks = [pytest.mark.torch] if folder in NEEDS_TORCH else []
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            found.append(pytest.param(".".join(["danaus", *init.parent.relative_to(ROOT).parts]), marks=marks))
    return found


def public_names(module: types.ModuleType) -> list[str]:
    """Names that a module binds for others to use: neither underscored nor a module."""
    for name in getattr(module, "__all__", ()):
        # Some are bound when they are first asked for.
        getattr(module, name)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "annotations" and not isinstance(value, types.ModuleType)
    )


@pytest.mark.parametrize("name", packages())
def test_all_lists_every_public_name_once(name: str) -> None:
    module = importlib.import_module(name)

    assert sorted(getattr(module, "__all__", [])) == public_names(module)


@pytest.mark.parametrize("name", packages())
def test_a_folder_says_what_it_is_for(name: str) -> None:
    assert (importlib.import_module(name).__doc__ or "").strip()


def test_the_root_repeats_what_the_runtime_offers() -> None:
    import danaus
    from danaus import runtime

    assert set(danaus.__all__) == set(runtime.__all__)
