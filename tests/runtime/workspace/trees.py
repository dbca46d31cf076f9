"""Small trees of files, as dictionaries: what is written, and what is found."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hypothesis import strategies as st

if TYPE_CHECKING:
    from pathlib import Path

Tree = dict[str, bytes]
"""Content by path. A path that ends in ``*`` is executable, one that ends in ``@`` a link to its content."""

NAMES = st.sampled_from(["a", "b", "c", "d.py", "e.txt"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
CONTENTS = st.sampled_from([b"", b"one", b"two", b"x" * 5000, bytes(range(256))])


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """A tree without a path that is both file and directory."""
    found: Tree = {}
    for path in draw(st.lists(PATHS, max_size=8, unique=True)):
        parts = path.split("/")
        is_below_a_file = any("/".join(parts[:cut]) in plain(found) for cut in range(1, len(parts)))
        if is_below_a_file or any(other.startswith(f"{path}/") for other in found):
            continue
        kind = draw(st.sampled_from(["", "", "*", "@"]))
        found[path + kind] = b"a" if kind == "@" else draw(CONTENTS)
    return found


def plain(tree: Tree) -> set[str]:
    """Its paths, without the marks."""
    return {path.rstrip("*@") for path in tree}


def write(top: Path, tree: Tree) -> Path:
    """Make ``top`` hold ``tree``, besides what is there."""
    top.mkdir(parents=True, exist_ok=True)
    for marked, content in tree.items():
        file = top / marked.rstrip("*@")
        file.parent.mkdir(parents=True, exist_ok=True)
        if marked.endswith("@"):
            file.symlink_to(os.fsdecode(content))
        else:
            file.write_bytes(content)
            file.chmod(0o755 if marked.endswith("*") else 0o644)
    return top


def read(top: Path) -> Tree:
    """What ``top`` holds."""
    found: Tree = {}
    for folder, folders, files in os.walk(top):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in [*files, *links]:
            full = os.path.join(folder, name)
            path = os.path.relpath(full, top)
            if os.path.islink(full):
                found[f"{path}@"] = os.fsencode(os.readlink(full))
            else:
                with open(full, "rb") as file:
                    found[f"{path}*" if os.access(full, os.X_OK) and os.stat(full).st_mode & 0o100 else path] = (
                        file.read()
                    )
    return found
