"""What goes wrong with code on other hosts.

DanausError
├── VersionMismatch       a host runs other versions of what both ends have to agree on
└── WorkspaceError        the working directory could not be sent
    └── WorkspaceTooLarge     it holds more than the limits allow (also a ValueError)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import DanausError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .versions import Difference

_SHOWN = 8


class VersionMismatch(DanausError):  # noqa: N818  names a state
    """Hosts run other versions than the controller, so that they could not read one another's messages.

    Attributes:
        differences: What differs, on which hosts.
    """

    def __init__(self, differences: Sequence[Difference]) -> None:
        super().__init__(tuple(differences))
        self.differences = tuple(differences)

    def __str__(self) -> str:
        by_hosts: dict[tuple[str, ...], list[Difference]] = {}
        for difference in self.differences:
            by_hosts.setdefault(difference.hosts, []).append(difference)
        hosts = {host for group in by_hosts for host in group}
        lines = [
            f"  {_some(group)}: " + ", ".join(f"{each.package} {each.has} (expected {each.expected})" for each in found)
            for group, found in by_hosts.items()
        ]
        differs = "1 host differs" if len(hosts) == 1 else f"{len(hosts)} hosts differ"
        return (
            f"{differs} from this controller, so messages between them could not be read:\n"
            + "\n".join(lines)
            + f"\n{self._advice()}"
        )

    def _advice(self) -> str:
        wanted = {each.package: each.expected for each in self.differences}
        pins = [
            f"'{package}=={version}'" if version.count(".") > 1 else f"'{package}=={version}.*'"
            for package, version in sorted(wanted.items())
            if package != "python"
        ]
        advice: list[str] = []
        if "python" in wanted:
            advice.append(f"start their `danaus host` with Python {wanted['python']} (any patch release)")
        if pins:
            advice.append(f"run `pip install {' '.join(pins)}` on them and start `danaus host` again")
        advice.append("or run this script with their versions")
        builds = "; builds of torch (+cpu, +cu130) may differ" if "torch" in wanted else ""
        return f"Do this: {', '.join(advice)}{builds}. sync_workspace() sends your own code, not installed packages."


class WorkspaceError(DanausError):
    """The working directory could not be sent to hosts, or not be written there."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class WorkspaceTooLarge(WorkspaceError, ValueError):  # noqa: N818  names a state
    """The working directory holds more than is meant to be sent; nothing was.

    Attributes:
        directory: The working directory.
        size: What it holds, as text.
        limit: What is allowed, as text.
        largest: What takes the most, with how much that is.
    """

    def __init__(self, directory: str, size: str, limit: str, largest: Sequence[tuple[str, str]]) -> None:
        super().__init__(f"{directory}: {size}")
        self.directory, self.size, self.limit, self.largest = directory, size, limit, tuple(largest)

    def __reduce__(self) -> tuple[Any, ...]:
        return WorkspaceTooLarge, (self.directory, self.size, self.limit, self.largest)

    def __str__(self) -> str:
        largest = "\n".join(f"  {size:>10}  {path}" for path, size in self.largest)
        return (
            f"{self.directory} holds {self.size}, and the limit is {self.limit}; the largest are\n{largest}\n"
            "Name what hosts do not need in .danausignore (lines as in .gitignore), or raise the limit: "
            "sync_workspace(max_bytes=..., max_files=...)"
        )


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
