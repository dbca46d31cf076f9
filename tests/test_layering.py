"""Imports point down: programs, tools -> actors -> runtime; actors, programs -> kernels; kernels never meet runtime."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MAY_IMPORT = {
    "runtime": {"runtime"},
    "kernels": {"kernels"},
    "actors": {"actors", "runtime", "kernels"},
    "programs": {"programs", "actors", "runtime", "kernels"},
    "tools": {"tools", "actors", "runtime"},
}
"""Folder to the folders it may import; the root's own ``__init__`` stands for ``runtime``, whose names it repeats."""

HEAVY = {"torch", "numpy", "triton"}
TORCH_WORDS = {"c10d", "tensor", "tensors", "torch", "group", "groups", "store"}
"""A file of ``runtime`` whose name holds one of these may import torch and numpy at its top."""

LIMITS_FILE = "limits.py"
"""The benchmark's limits are measured by code that imports nothing of danaus, wherever the file lies in tools/bench."""


@dataclass(frozen=True, slots=True)
class Import:
    """One import: where, of what, and when it is carried out: with the module, later, or by type checkers only."""

    path: Path
    line: int
    module: str
    is_relative: bool
    is_at_top: bool
    is_for_types: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"

    @property
    def top(self) -> str:
        """The first part of the module's name."""
        return self.module.partition(".")[0]

    @property
    def folder(self) -> str | None:
        """The folder of the package that it leads to, None for other packages."""
        parts = self.module.split(".")
        if parts[0] != "danaus":
            return None
        return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "runtime"


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports_of(path: Path) -> list[Import]:
    """Every import of a file, with relative ones made absolute."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    package = ["danaus", *path.relative_to(ROOT).parts[:-1]]
    found: list[Import] = []

    def add(node: ast.AST, names: list[str], *, is_relative: bool, is_at_top: bool, is_for_types: bool) -> None:
        line = getattr(node, "lineno", 0)
        found.extend(Import(path, line, name, is_relative, is_at_top, is_for_types) for name in names)

    def visit(node: ast.AST, *, is_at_top: bool, is_for_types: bool = False) -> None:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            add(node, names, is_relative=False, is_at_top=is_at_top, is_for_types=is_for_types)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            names = [module] if node.module else [f"{module}.{alias.name}" for alias in node.names]
            add(node, names, is_relative=bool(node.level), is_at_top=is_at_top, is_for_types=is_for_types)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, is_at_top=False, is_for_types=True)
            for child in node.orelse:
                visit(child, is_at_top=is_at_top, is_for_types=is_for_types)
        else:
            is_delayed = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                visit(child, is_at_top=is_at_top and not is_delayed, is_for_types=is_for_types)

    visit(tree, is_at_top=True)
    return found


def folders_here() -> list[str]:
    return [folder for folder in MAY_IMPORT if (ROOT / folder).is_dir()]


@pytest.mark.parametrize("folder", folders_here())
def test_a_folder_imports_only_from_those_below_it(folder: str) -> None:
    upward = [
        str(item)
        for path in sources(folder)
        for item in imports_of(path)
        if item.folder is not None and item.folder not in MAY_IMPORT[folder]
    ]

    assert upward == []


@pytest.mark.parametrize("folder", [folder for folder in folders_here() if folder != "programs"])
def test_inside_the_package_imports_are_relative(folder: str) -> None:
    absolute = [str(item) for path in sources(folder) for item in imports_of(path) if _names_us_absolutely(item)]

    assert absolute == []


def _names_us_absolutely(item: Import) -> bool:
    return not item.is_relative and (item.top == "danaus" or (item.top in MAY_IMPORT and item.top != "tools"))


def test_tests_import_the_package_by_its_installed_name() -> None:
    wrong = [str(item) for path in sources("tests") for item in imports_of(path) if _reaches_past_the_name(item)]

    assert wrong == []


def _reaches_past_the_name(item: Import) -> bool:
    if item.is_relative:
        return not item.module.startswith("danaus.tests.")
    return item.top in {*MAY_IMPORT, "tests"} or item.module.startswith("danaus.tests")


def test_the_runtime_imports_torch_only_where_a_file_says_so() -> None:
    wrong = [
        str(item)
        for path in sources("runtime")
        for item in imports_of(path)
        if item.is_at_top and item.top in HEAVY and not TORCH_WORDS & set(path.stem.split("_"))
    ]

    assert wrong == []


def test_tools_do_not_import_torch_when_they_are_loaded() -> None:
    paths = [path for path in sources("tools") if "bench" not in path.parts]
    wrong = [str(item) for path in paths for item in imports_of(path) if item.is_at_top and item.top in HEAVY]

    assert wrong == []


def test_the_limits_of_the_benchmark_import_nothing_of_danaus() -> None:
    paths = [path for path in sources("tools") if path.name == LIMITS_FILE]
    wrong = [str(item) for path in paths for item in imports_of(path) if item.top == "danaus" or item.is_relative]

    assert wrong == []


def test_importing_danaus_needs_neither_torch_nor_numpy() -> None:
    code = "import sys; sys.modules.update(torch=None, numpy=None); import danaus, danaus.tools.doctor"

    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=15)


def test_the_root_has_no_other_module_than_init() -> None:
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


def test_every_folder_of_code_is_a_package_that_is_shipped() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shipped = set(settings["tool"]["setuptools"]["packages"])
    folders = {path.parent for folder in folders_here() for path in sources(folder)}

    assert shipped == {"danaus", *("danaus." + ".".join(path.relative_to(ROOT).parts) for path in folders)}
    assert [str(path) for path in folders if not (path / "__init__.py").exists()] == []
