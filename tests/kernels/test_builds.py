"""Every kernel compiles for Hopper as production launches it, fits there and does not spill."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .aot import Build, Compiler

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"


def all_builds() -> list[Build]:
    """What each part of the tests lists in its ``builds.py``."""
    found: list[Build] = []
    for path in sorted(HERE.glob("*/builds.py")):
        module = importlib.import_module(f"..{path.parent.name}.builds", __name__)
        found.extend(module.builds())
    return found


BUILDS = all_builds()


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler() as compiler:
        yield compiler


@pytest.mark.timeout(120)
@pytest.mark.parametrize("build", BUILDS, ids=[build.name for build in BUILDS])
def test_it_compiles_for_hopper_fits_and_does_not_spill(build: Build, compiler: Compiler) -> None:
    compiler.check(build)


def test_names_of_builds_are_unique() -> None:
    names = [build.name for build in BUILDS]

    assert sorted(set(names)) == sorted(names)


def test_every_kernel_has_a_build() -> None:
    built = {name_of(build.kernel) for build in BUILDS}

    assert sorted(kernels_in_sources() - built) == []


def name_of(kernel: object) -> tuple[str, str]:
    """Module and name of the function that ``@triton.jit`` and others were put around."""
    while (inner := getattr(kernel, "fn", None)) is not None:
        kernel = inner
    return str(getattr(kernel, "__module__", "")), str(getattr(kernel, "__name__", ""))


def kernels_in_sources() -> set[tuple[str, str]]:
    """Module and name of every jitted function that is launched, which is to say, called ``*_kernel``."""
    return {
        (".".join(["danaus", "kernels", *path.relative_to(KERNELS).with_suffix("").parts]), node.name)
        for path in KERNELS.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and is_jitted(node)
    }


def is_jitted(node: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
