"""`danaus run SCRIPT`: what `python SCRIPT` does, and errors of the runtime told in a few lines.

The script runs as `__main__` in this process, which stays so until exit: threads and exit hooks find their globals, as
they would under plain Python. SystemExit, KeyboardInterrupt and an excepthook of the script's own are left alone.

With `--nproc` the script is no controller: it runs on every process of a mesh, as under torchrun (spmd_run.py).
"""

from __future__ import annotations

import argparse
import linecache
import os
import sys
import traceback
from typing import TYPE_CHECKING

from ..runtime.errors import DanausError
from ..runtime.script import run_module, run_script, without_launcher
from .spmd_run import add_options, check_options, run_spmd

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

SUMMARY = "run a controller script, with errors that read well; or, with --nproc, a script written for torchrun"
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main(arguments: Sequence[str]) -> int:
    """Run a script; return 1 if it raised, after saying what."""
    parser = argparse.ArgumentParser(prog="danaus run", description=SUMMARY)
    parser.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT names a module, as in python -m")
    parser.add_argument("--traceback", action="store_true", help="show every frame of an error, as plain Python does")
    add_options(parser)
    parser.add_argument("script", metavar="SCRIPT", help="a Python file, or a folder or zip file with a __main__.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="for the script, in sys.argv[1:]")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    try:
        if options.nproc is not None:
            return run_spmd(options)
        if options.is_module:
            run_module(options.script, options.arguments)
        else:
            run_script(options.script, options.arguments)
    except Exception as error:  # noqa: BLE001  this is where a script's errors end
        _report(error, in_full=options.traceback)
        return 1
    return 0


def _report(error: Exception, *, in_full: bool) -> None:
    own = _own_frames(error.__traceback__)
    if in_full or not isinstance(error, DanausError) or sys.excepthook is not sys.__excepthook__:
        sys.excepthook(type(error), error.with_traceback(own), own)
        return
    print(describe(error, own), file=sys.stderr)


def describe(error: DanausError, where: TracebackType | None) -> str:
    """Return a short report: what happened, where the script asked for it, what the remote side says.

    Args:
        error: What the runtime raised.
        where: Its traceback; frames of the runtime are left out.
    """
    frames = [frame for frame in traceback.extract_tb(where) if not _is_ours(frame.filename)]
    first, _, rest = str(error).partition("\n")
    lines = [f"{type(error).__name__}: {first}"]
    for frame in frames:
        lines.append(f"  {frame.filename}:{frame.lineno} in {frame.name}")
        source = linecache.getline(frame.filename, frame.lineno or 0).strip()
        lines += [f"    {source}"] if source else []
    lines += [rest.rstrip()] if rest.strip() else []
    lines += [f"note: {note}" for note in getattr(error, "__notes__", [])]
    return "\n".join(lines)


def _is_ours(path: str) -> bool:
    path = os.path.abspath(path)
    folders = ("runtime", "actors", "tools")
    return any(path.startswith(os.path.join(_PACKAGE, folder) + os.sep) for folder in folders)


def _own_frames(where: TracebackType | None) -> TracebackType | None:
    """Skip the frames that plain Python would not have."""
    while where is not None and where.tb_frame.f_code.co_filename == __file__:
        where = where.tb_next
    return without_launcher(where)
