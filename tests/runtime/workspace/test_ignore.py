"""Which files are not sent; git itself says what is right."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from danaus.runtime.workspace.ignore import Rules, is_ignored
from danaus.runtime.workspace.scan import scan

if TYPE_CHECKING:
    from pathlib import Path

PARTS = [
    "a",
    "b",
    "foo",
    "x.py",
    "*",
    "**",
    "***",
    "?",
    "a*",
    "*.py",
    "[ab]",
    "[!a]",
    "[^a-b]*",
    "[]a]",
    "[b-a]",
    "f**",
]
ODD = [
    "",
    "#c",
    "\\!a",
    "\\#c",
    "!",
    "\\",
    "a\\",
    "[a",
    "[[:alpha:]]",
    "[[:nope:]]",
    "a ",
    "a\\ ",
    "/",
    "//a",
    "x.p[y]",
]


@st.composite
def rules(draw: st.DrawFn) -> str:
    """A line of an ignore file, likely to match something in the tree below."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(ODD))
    parts = draw(st.lists(st.sampled_from(PARTS), min_size=1, max_size=3))
    return (
        draw(st.sampled_from(["", "", "!"]))
        + draw(st.sampled_from(["", "/"]))
        + "/".join(parts)
        + draw(st.sampled_from(["", "", "/"]))
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with three levels of directories and files of the same few names."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed: it is what the rules are compared with")
    top = tmp_path_factory.mktemp("tree")
    run_git(top, "init", "--quiet")

    def fill(folder: Path, depth: int) -> None:
        for name in ("a", "b", "foo"):
            if depth:
                (folder / name).mkdir()
                fill(folder / name, depth - 1)
            else:
                (folder / name).touch()
        (folder / "x.py").touch()
        (folder / "b.txt").touch()

    fill(top, 2)
    return top


def run_git(top: Path, *arguments: str) -> str:
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(
        ["git", "-C", str(top), *arguments], capture_output=True, text=True, timeout=15, check=True, env=environment
    )
    return done.stdout


def sent_by_git(top: Path) -> list[str]:
    listed = run_git(top, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    return sorted(path for path in listed if path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    top=st.lists(rules(), max_size=4),
    below=st.lists(rules(), max_size=3),
    folder=st.sampled_from(["a", "foo", "a/b"]),
)
@example(top=["foo", "!a/", "!a/b"], below=[], folder="a")
@example(top=["a/*", "!a/b"], below=["*", "!x.py"], folder="a/b")
@example(top=["f**/a", "***/b"], below=["/**"], folder="a")
def test_files_are_sent_that_git_would_not_ignore(tree: Path, top: list[str], below: list[str], folder: str) -> None:
    files = [tree / ".gitignore", tree / folder / ".gitignore"]
    for file, lines in zip(files, (top, below), strict=True):
        file.write_text("".join(f"{line}\n" for line in lines))

    sent = sorted(scan(str(tree)).manifest.entries)
    sent_of_part = sorted(scan(str(tree / "a")).manifest.entries)
    expected, expected_of_part = sent_by_git(tree), sent_by_git(tree / "a")
    is_part_ignored = is_ignored([Rules(top)], "a", "a", is_directory=True)

    for file in files:
        file.unlink()
    assert sent == expected
    assert sent_of_part == expected_of_part or is_part_ignored


@pytest.mark.parametrize(
    ("lines", "path", "is_directory", "ignored"),
    [
        (["*.log"], "logs/a.log", False, True),
        (["/logs"], "logs", True, True),
        (["/logs"], "deep/logs", True, False),
        (["logs/"], "logs", False, False),
        (["data/**/raw"], "data/x/y/raw", True, True),
        (["data/**/raw"], "data/raw", True, True),
        (["*.txt", "!keep.txt"], "keep.txt", False, False),
        (["!keep.txt", "*.txt"], "keep.txt", False, True),
        (["a\r"], "a", False, True),
        (["Ä*"], "Äpfel", False, True),
    ],
)
def test_the_last_rule_that_matches_decides(lines: list[str], path: str, *, is_directory: bool, ignored: bool) -> None:
    name = path.rpartition("/")[2]

    assert is_ignored([Rules(lines)], path, name, is_directory=is_directory) is ignored


def test_rules_of_a_deeper_directory_come_after_those_above_and_count_from_there() -> None:
    above, below = Rules(["*.txt"]), Rules(["!/notes.txt"], base="docs")

    assert not is_ignored([above, below], "docs/notes.txt", "notes.txt", is_directory=False)
    assert is_ignored([above, below], "docs/old/notes.txt", "notes.txt", is_directory=False)


def test_no_rule_says_nothing() -> None:
    assert Rules([]).decide("a", "a", is_directory=False) is None
