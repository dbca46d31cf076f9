"""Starts a fresh Python that finds the same modules as this one.

The search path travels in a variable that the new process removes before anything can inherit it: ``PYTHONPATH`` would
reach everything that users' processes start, and on the command line it would bury what ``ps`` is asked for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_VARIABLE = "DANAUS_SYS_PATH"
_BODY = (
    "import os, sys; sys.path[:] = os.environ.pop({variable!r}).split(os.pathsep); "
    "from {module} import main; main(sys.argv[1:])"
)


def start(
    module: str,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    start_new_session: bool = False,
    pass_fds: Sequence[int] = (),
    stdin: int = subprocess.DEVNULL,
    stdout: int | None = None,
) -> subprocess.Popen[bytes]:
    """Run ``main(arguments)`` of a module of ours in a process of its own.

    Args:
        module: Its full name.
        *arguments: Command line arguments.
        env: Variables that it has besides those of this process.
        start_new_session: As for :class:`subprocess.Popen`.
        pass_fds: As for :class:`subprocess.Popen`.
        stdin: As for :class:`subprocess.Popen`.
        stdout: As for :class:`subprocess.Popen`.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-c", _BODY.format(variable=_VARIABLE, module=module), *arguments]
    return subprocess.Popen(  # noqa: S603  our own interpreter and module
        command,
        stdin=stdin,
        stdout=stdout,
        env={**os.environ, **(env or {}), _VARIABLE: path},
        start_new_session=start_new_session,
        pass_fds=pass_fds,
    )
