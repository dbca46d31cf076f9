"""Says which versions a host has to share with the controller, and where it does not.

What is pickled here is loaded there: the interpreter's minor version decides about code objects, torch and cloudpickle
about what their objects look like in a pickle. Reads the packages' metadata only; nothing is imported for it.
"""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_PACKAGES: Final = ("torch", "numpy", "cloudpickle", "msgpack", "pyzmq")
_OPTIONAL: Final = frozenset({"torch", "numpy"})
"""Where this process lacks one, the hosts that have it only have to agree with one another."""
_NUM_PARTS: Final = {"python": 2, "numpy": 1, "msgpack": 1, "pyzmq": 1}
"""How many parts of a version have to be equal; all of them where nothing is said."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One package of which hosts have another version than is expected.

    Attributes:
        package: Its name, or ``python``.
        expected: As much of the version as has to be equal.
        found: What they have, whole; empty where they lack it.
        hosts: The hosts that have it, in the order given.
    """

    package: str
    expected: str
    found: str
    hosts: tuple[str, ...]

    @property
    def has(self) -> str:
        """What they have, for a reader."""
        return self.found or "is not installed"


def own_versions() -> dict[str, str]:
    """Return this process's versions by package; empty text for what is not installed."""
    from ... import __version__

    return {"python": platform.python_version(), "danaus": __version__, **{name: _version(name) for name in _PACKAGES}}


def compare(own: Mapping[str, str], others: Mapping[str, Mapping[str, str]]) -> list[Difference]:
    """Return where hosts differ from ``own``, package by package; nothing where all agree.

    Args:
        own: What the controller has; see :func:`own_versions`.
        others: What each host has, by its name.
    """
    differences: list[Difference] = []
    for package, version in own.items():
        expected = _relevant(package, version)
        is_free = not expected and package in _OPTIONAL
        if is_free:
            counts = Counter(_relevant(package, versions.get(package, "")) for versions in others.values())
            # Of equally many the same one, whatever the order of the hosts.
            expected = max(filter(None, counts), key=lambda each: (counts[each], each), default="")
        found: dict[str, list[str]] = {}
        for host, versions in others.items():
            theirs = versions.get(package, "")
            if _relevant(package, theirs) != expected and (theirs or not is_free):
                found.setdefault(theirs, []).append(host)
        differences += [Difference(package, expected, theirs, tuple(hosts)) for theirs, hosts in found.items()]
    return differences


def _relevant(package: str, version: str) -> str:
    """The part of ``version`` that has to be equal: builds of one version (``+cpu``) read each other's pickles."""
    public = version.partition("+")[0]
    return ".".join(public.split(".")[: _NUM_PARTS.get(package)])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
