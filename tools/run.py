"""`danaus run SCRIPT`: what `python SCRIPT` does, and errors of the runtime told in a few lines.

The script runs as `__main__` in this process, which stays so until exit: threads and exit hooks find their globals, as
they would under plain Python. SystemExit, KeyboardInterrupt and an excepthook of the script's own are left alone.
"""

from __future__ import annotations

import argparse
import builtins
import io
import linecache
import os
import runpy
import sys
import traceback
import types
from typing import TYPE_CHECKING

from ..runtime.errors import DanausError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

SUMMARY = "run a controller script, with errors that read well"
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main(arguments: Sequence[str]) -> int:
    """Run a script; return 1 if it raised, after saying what."""
    parser = argparse.ArgumentParser(prog="danaus run", description=SUMMARY)
    parser.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT names a module, as in python -m")
    parser.add_argument("--traceback", action="store_true", help="show every frame of an error, as plain Python does")
    parser.add_argument("script", metavar="SCRIPT", help="a Python file, or a folder or zip file with a __main__.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="for the script, in sys.argv[1:]")
    options = parser.parse_args(arguments)
    try:
        if options.is_module:
            run_module(options.script, options.arguments)
        else:
            run_script(options.script, options.arguments)
    except Exception as error:  # noqa: BLE001  this is where a script's errors end
        _report(error, in_full=options.traceback)
        return 1
    return 0


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run a file as `__main__`."""
    sys.argv[:] = [path, *arguments]
    if os.path.isdir(path) or _is_zip(path):
        # runpy puts the folder or archive first on the path.
        del sys.path[:1]
        runpy.run_path(path, run_name="__main__")
        return
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        raise SystemExit(f"danaus run: cannot open {path!r}: {error.strerror}") from error
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    module = types.ModuleType("__main__")
    module.__file__ = path
    module.__dict__["__builtins__"] = builtins
    module.__dict__["__cached__"] = None
    sys.modules["__main__"] = module
    exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)  # noqa: S102  the user's script


def run_module(name: str, arguments: Sequence[str]) -> None:
    """Run a module as `__main__`, found from the current directory as by `python -m`."""
    sys.argv[:] = [name, *arguments]
    sys.path[0] = os.getcwd()
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _is_zip(path: str) -> bool:
    import zipfile

    return os.path.isfile(path) and zipfile.is_zipfile(path)


def _report(error: Exception, *, in_full: bool) -> None:
    own = _without_launcher(error.__traceback__)
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


def _without_launcher(where: TracebackType | None) -> TracebackType | None:
    """Skip the frames of this file and of runpy, which plain Python would not have."""
    while where is not None and where.tb_frame.f_code.co_filename in {__file__, runpy.__file__, "<frozen runpy>"}:
        where = where.tb_next
    return where
