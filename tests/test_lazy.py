"""Names that most scripts do not use are imported when they are first asked for."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from danaus.runtime.lazy import late

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import ModuleType


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package of two modules, each of which counts how often it is imported."""
    folder = tmp_path / "lazily"
    folder.mkdir()
    (folder / "__init__.py").write_text("imported = []\n")
    for name in ("tools", "things"):
        (folder / f"{name}.py").write_text(f"from . import imported\nimported.append({name!r})\nThing = object()\n")
    (folder / "broken.py").write_text("raise ImportError('needs more')\n")
    monkeypatch.syspath_prepend(tmp_path)
    package = __import__("lazily")
    package.__getattr__ = late("lazily", {"Thing": ".things", "tools": ".tools", "Lost": ".things", "Worse": ".broken"})
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "lazily"]:
        del sys.modules[name]


def test_nothing_is_imported_before_it_is_asked_for(package: ModuleType) -> None:
    assert package.imported == []


def test_a_name_is_what_its_module_calls_so(package: ModuleType) -> None:
    assert package.Thing is sys.modules["lazily.things"].Thing
    assert package.imported == ["things"]


def test_a_module_may_be_had_itself(package: ModuleType) -> None:
    assert package.tools is sys.modules["lazily.tools"]


def test_a_name_is_found_without_asking_again(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = package.Thing
    monkeypatch.delattr(package, "__getattr__")

    assert package.Thing is found


def test_a_name_can_be_imported_from_the_package(package: ModuleType) -> None:
    namespace: dict[str, object] = {}

    exec("from lazily import Thing", namespace)

    assert namespace["Thing"] is package.Thing


def test_an_unknown_name_reads_as_in_any_module(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match="module 'lazily' has no attribute 'Nothing'"):
        package.Nothing  # noqa: B018
    assert not hasattr(package, "__wrapped__")


def test_a_name_that_its_module_lacks_is_an_error_that_says_where(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match=r"lazily\.things.*Lost"):
        package.Lost  # noqa: B018


def test_a_module_that_cannot_be_imported_says_why_each_time(package: ModuleType) -> None:
    for _ in range(2):
        with pytest.raises(ImportError, match="needs more"):
            package.Worse  # noqa: B018
