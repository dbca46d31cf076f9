"""Starts a fresh Python that finds the same modules as this one, without telling it by the environment.

Variables set for it would be inherited by everything that users' processes start.
"""

from __future__ import annotations

import sys

_BODY = "import sys; sys.path[:] = sys.argv.pop(1).split(chr(10)); from {module} import main; main(sys.argv[1:])"


def command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs ``main(arguments)`` of a module of ours."""
    path = "\n".join(entry for entry in sys.path if entry)
    return [sys.executable, "-c", _BODY.format(module=module), path, *arguments]
