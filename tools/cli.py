"""The `danaus` command: finds the subcommand and hands the rest of the command line to it.

A subcommand is a module with ``main(arguments) -> int``, imported when it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS: Final = {
    "bench": ("bench", "measure the runtime, each figure beside its limit"),
    "doctor": ("doctor", "say what this machine has, what is missing and how to get it"),
    "host": ("host", "let controllers that hold the key run jobs on this machine"),
    "job": ("job", "start hosts from a file, look at them, run things on them, end them"),
    "key": ("key", "make a key file for hosts and those who control them"),
    "run": ("run", "run a controller script, with errors that read well"),
}
"""Name of a subcommand to its module in this folder, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code.

    Args:
        arguments: The command line without the program's name; by default that of this process.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    module_name, _ = COMMANDS[options.command]
    module = importlib.import_module(f".{module_name}", __package__)
    try:
        return int(module.main(options.arguments) or 0)
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone, which is no error of ours.
        sys.stderr.close()
        return 141


def version_line() -> str:
    """Return the versions that a report of a problem should name."""
    found = [f"{name} {version}" for name in ("pyzmq", "torch") if (version := _version(name))]
    return f"danaus {_version('danaus') or 'unknown'} (Python {', '.join([platform.python_version(), *found])})"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="danaus",
        description="One Python script drives a cluster.",
        epilog=f"commands:\n{listing}\n\n`danaus COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version_line())
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="passed on to it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
