"""Which files of a working directory are not sent: rules as in ``.gitignore``, read as git reads them.

A tree is walked from the top, and a directory that is ignored is not entered, so a rule below it cannot bring anything
back. Of the rules that match a path the last one decides, those of deeper directories after those above.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

IGNORE_FILE: Final = ".danausignore"
"""Where the top directory has it, files of this name are read in place of git's."""
GIT_IGNORE_FILE: Final = ".gitignore"

NEVER_SENT: Final = frozenset({".git", ".hg", ".svn"})
"""No rule brings these back."""

DEFAULT_RULES: Final = (
    "__pycache__/",
    "*.py[co]",
    ".venv/",
    "venv/",
    ".tox/",
    ".nox/",
    "node_modules/",
    ".mypy_cache/",
    ".pytest_cache/",
    ".ruff_cache/",
    ".hypothesis/",
    ".ipynb_checkpoints/",
    ".DS_Store",
    "*.swp",
)
"""After the rules of git, since allow-lists bring every directory back; before ours, whose authors know of these."""

_WILD: Final = frozenset("*?[\\")
_POSIX: Final = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "blank": " \\t",
    "digit": "0-9",
    "lower": "a-z",
    "punct": "!-/:-@\\[-`{-~",
    "space": " \\t\\n\\r\\f\\v",
    "upper": "A-Z",
    "xdigit": "0-9A-Fa-f",
}


@dataclass(frozen=True, slots=True)
class _Group:
    """Rules that follow one another and say the same: ``ignored`` is what a match means."""

    ignored: bool
    names: re.Pattern[str] | None
    paths: re.Pattern[str] | None

    def matches(self, name: str, path: str) -> bool:
        return (self.names is not None and self.names.fullmatch(name) is not None) or (
            self.paths is not None and self.paths.fullmatch(path) is not None
        )


class Rules:
    """The rules of one directory.

    Args:
        lines: As in ``.gitignore``.
        base: The directory that they stand in, relative to the top, empty for the top itself.
        above: For rules of a directory above the top: the top, relative to that.
    """

    def __init__(self, lines: Iterable[str], *, base: str = "", above: str = "") -> None:
        self._cut = len(base) + 1 if base else 0
        self._above = f"{above}/" if above else ""
        runs: list[tuple[bool, tuple[list[str], list[str]]]] = []
        for line in lines:
            rule = _parse(line)
            if rule is None:
                continue
            ignored, is_path, pattern = rule
            if not runs or runs[-1][0] is not ignored:
                runs.append((ignored, ([], [])))
            runs[-1][1][is_path].append(pattern)
        self._groups = [_Group(ignored, _either(names), _either(paths)) for ignored, (names, paths) in reversed(runs)]

    def decide(self, path: str, name: str, *, is_directory: bool) -> bool | None:
        """Say whether ``path`` (relative to the top) is ignored; None where no rule matches."""
        end = "\0" if is_directory else ""
        relative, name = self._above + path[self._cut :] + end, name + end
        for group in self._groups:
            if group.matches(name, relative):
                return group.ignored
        return None


def is_ignored(rules: Sequence[Rules], path: str, name: str, *, is_directory: bool) -> bool:
    """Ask ``rules``, the deepest last, about a path whose directory is not ignored."""
    for each in reversed(rules):
        decision = each.decide(path, name, is_directory=is_directory)
        if decision is not None:
            return decision
    return False


def _either(patterns: list[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(patterns), re.DOTALL) if patterns else None


def _parse(line: str) -> tuple[bool, bool, str] | None:
    """Return whether a line ignores, whether it is about a path (not a name), and its regular expression.

    What is matched ends in a zero byte for a directory, which no name can hold.
    """
    text = re.sub(r"(?<!\\) +$", "", line.rstrip("\r\n"))
    if not text or text.startswith("#"):
        return None
    ignored = not text.startswith("!")
    text = text if ignored else text[1:]
    only_directories = text.endswith("/")
    text = text.removesuffix("/")
    is_path = "/" in text
    translated = _translate(text.removeprefix("/"), is_path=is_path)
    if not text or translated is None:
        return None
    return ignored, is_path, translated + ("\\0" if only_directories else "\\0?")


def _translate(glob: str, *, is_path: bool) -> str | None:
    """Return a regular expression for a pattern of git's; None for one that matches nothing."""
    parts: list[str] = []
    at = 0
    while at < len(glob):
        char = glob[at]
        if char == "*":
            part, at = _stars(glob, at, is_path=is_path)
        elif char == "[":
            found = _bracket(glob, at)
            if found is None:
                return None
            part, at = found
        elif char == "?":
            part, at = "[^/\\0]", at + 1
        elif char == "\\":
            if at + 1 == len(glob):
                return None
            part, at = re.escape(glob[at + 1]), at + 2
        else:
            part, at = re.escape(char), at + 1
        parts.append(part)
    return "".join(parts)


def _stars(glob: str, at: int, *, is_path: bool) -> tuple[str, int]:
    end = at
    while end < len(glob) and glob[end] == "*":
        end += 1
    # git compares what stands before the first wildcard of a path by itself: these stars are the first of the rest.
    is_first = is_path and not _WILD.intersection(glob[:at])
    is_whole_part = (is_first or glob[at - 1] == "/") and (end == len(glob) or glob[end] == "/")
    if end - at < 2 or not is_whole_part:
        return "[^/\\0]*", end
    if end == len(glob):
        return ".+" if glob[at - 1 : at] == "/" else ".*", end
    return "(?:.*/)?", end + 1


def _bracket(glob: str, at: int) -> tuple[str, int] | None:
    """Translate ``[...]``; None where it is not closed."""
    at += 1
    negated = glob[at : at + 1] in {"!", "^"}
    at += negated
    first, items = at, list[str]()
    while at < len(glob) and (glob[at] != "]" or at == first):
        name = re.match(r"\[:([a-z]*):\]", glob[at:])
        if name is not None:
            if name[1] not in _POSIX:
                return None
            items.append(_POSIX[name[1]])
            at += name.end()
            continue
        low, at = _literal(glob, at)
        high = low
        if glob[at : at + 1] == "-" and glob[at + 1 : at + 2] not in {"", "]"}:
            high, at = _literal(glob, at + 1)
        items.append(f"{re.escape(low)}-{re.escape(max(low, high))}")
    if at >= len(glob):
        return None
    return f"(?![/\\0])[{'^' if negated else ''}{''.join(items)}]", at + 1


def _literal(glob: str, at: int) -> tuple[str, int]:
    if glob[at] == "\\" and at + 1 < len(glob):
        at += 1
    return glob[at], at + 1
