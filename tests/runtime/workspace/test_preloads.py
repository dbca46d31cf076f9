"""Processes get another zygote where the code that it would preload has changed, and only there."""

from __future__ import annotations

import os
import sys
import sysconfig
from typing import TYPE_CHECKING

import pytest

from danaus.runtime.workspace.preloads import find_origin, preload_key

from .trees import write

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A host's copy of a workspace."""
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws/root").write_text("1111")
    return write(
        tmp_path / "ws/copy",
        {"mine.py": b"", "pkg/__init__.py": b"", "pkg/sub/__init__.py": b"", "pkg/leaf.py": b"", "space/mod.py": b""},
    )


def key(copy: Path, *modules: str, base: str = "base") -> str:
    return preload_key(base, modules, [str(copy), *sys.path], [str(copy)])


def test_without_modules_the_key_is_kept(copy: Path) -> None:
    assert key(copy, base="plain") == "plain"


@pytest.mark.parametrize("module", ["mine", "pkg", "pkg.leaf", "pkg.sub", "space.mod", "space"])
def test_any_edit_of_the_workspace_gives_another_zygote_to_modules_of_it(copy: Path, module: str) -> None:
    before = key(copy, "json", module), key(copy, "json")

    (copy.parent / "root").write_text("2222")

    assert key(copy, "json", module) != before[0]
    assert key(copy, "json") == before[1]


def test_code_that_is_as_before_has_the_zygote_of_before(copy: Path) -> None:
    before = key(copy, "mine")
    (copy.parent / "root").write_text("2222")
    (copy.parent / "root").write_text("1111")

    assert key(copy, "mine") == before


def test_a_module_outside_of_workspaces_is_told_by_its_time(tmp_path: Path) -> None:
    write(tmp_path, {"mine.py": b""})
    before = preload_key("base", ["mine"], [str(tmp_path)], [])

    os.utime(tmp_path / "mine.py", (1e9, 1e9))

    assert preload_key("base", ["mine"], [str(tmp_path)], []) != before


def test_modules_of_other_places_and_what_else_tells_zygotes_apart_count(copy: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", {"mine.py": b""})
    keys = [
        key(copy, "mine"),
        key(copy, "mine", base="other"),
        key(copy, "mine", "pkg"),
        key(copy, "nowhere"),
        preload_key("base", ["mine"], [str(other)], [str(copy)]),
    ]

    assert len(set(keys)) == len(keys)


def test_a_module_is_found_without_importing_anything(copy: Path) -> None:
    found = {name: find_origin(name, [str(copy)]) for name in ("mine", "pkg", "pkg.sub", "pkg.leaf", "space.mod")}

    assert found == {
        "mine": str(copy / "mine.py"),
        "pkg": str(copy / "pkg/__init__.py"),
        "pkg.sub": str(copy / "pkg/sub/__init__.py"),
        "pkg.leaf": str(copy / "pkg/leaf.py"),
        "space.mod": str(copy / "space/mod.py"),
    }
    assert not {"mine", "pkg", "space"} & sys.modules.keys()


@pytest.mark.parametrize("name", ["nowhere", "mine.sub", "pkg.nowhere", "sys", "", ".", "pkg."])
def test_a_module_without_a_file_has_none(copy: Path, name: str) -> None:
    assert find_origin(name, [str(copy)]) == ""


def test_installed_modules_are_found(copy: Path) -> None:
    assert find_origin("json.decoder", sys.path).startswith(sysconfig.get_path("stdlib"))
