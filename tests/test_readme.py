"""What a reader may paste works: the README's Python blocks, and the examples in docstrings.

A block is a script of its own. A block of ``output`` right after one is what it prints, and ``<!-- not run: why -->``
on the line before a block leaves it out.
"""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"(?P<skip><!-- not run: [^\n]*-->\n+)?^```python\n(?P<code>.*?)^```\n(?:\n*```output\n(?P<output>.*?)^```)?",
    re.MULTILINE | re.DOTALL,
)
DOCUMENTED = ("runtime", "actors", "programs", "tools")
NEEDS_TORCH = ("actors", "programs")


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of Python in a text."""

    line: int
    code: str
    output: str | None


def blocks(text: str) -> list[Block]:
    """The Python blocks of a text that are to be run."""
    return [
        Block(text.count("\n", 0, match.start("code")), match["code"], match["output"])
        for match in BLOCK.finditer(text)
        if not match["skip"]
    ]


def modules_with_examples() -> list[object]:
    found = []
    for folder in DOCUMENTED:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                parts = path.relative_to(ROOT).with_suffix("").parts
                marks = [pytest.mark.torch] if folder in NEEDS_TORCH else []
                found.append(pytest.param(".".join(["danaus", *parts]).removesuffix(".__init__"), marks=marks))
    return found


README = blocks((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("block", README, ids=lambda block: f"line-{block.line}")
def test_a_block_of_the_readme_runs(block: Block, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(block.code, encoding="utf-8")

    command = [sys.executable, script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False)

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if block.output is not None:
        assert done.stdout == block.output


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_in_docstrings_print_what_they_say(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)

    assert failed == 0, capsys.readouterr().out


def test_blocks_are_found_with_their_output_and_without_those_left_out() -> None:
    shown = "# T\n\n```python\nprint(1)\n```\n\n```output\n1\n```\n"
    left_out = "\n<!-- not run: needs a cluster -->\n```python\nboom\n```\n"

    assert blocks(shown + left_out) == [Block(3, "print(1)\n", "1\n")]
