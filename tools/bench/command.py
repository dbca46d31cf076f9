"""``danaus bench``: its options, and the order of a run. Loads what it measures with only when it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark with the given arguments; return the exit code.

    0: measured, whatever the verdicts. 1: a measure failed, or ``--compare`` found a regression. 2: cannot start.
    130: interrupted; what had been measured is printed and written.
    """
    options = _parse(argv)
    try:
        from .session import run
    except ImportError as error:
        print(f"danaus bench: {error}; install it with: pip install 'danaus[jobs]'", file=sys.stderr)
        return 2
    try:
        return run(options)
    except (ImportError, ValueError, OSError) as error:
        print(f"danaus bench: {error}", file=sys.stderr)
        return 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="danaus bench",
        description="Measure calls, payloads, starts, memory and deaths, each beside the machine's limit.",
    )
    parser.add_argument(
        "--only",
        metavar="NAMES",
        action="append",
        default=[],
        help="measures whose names start so, separated by commas",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the measures and end")
    parser.add_argument("--quick", action="store_true", help="fewer samples: under a minute on two cores")
    parser.add_argument("--large", action="store_true", help="with 500 procs at the end")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all samples there")
    parser.add_argument("--peer", metavar="NAME", help="measure monarch or ray instead, if installed")
    parser.add_argument("--compare", metavar="FILE", type=Path, help="print what is worse than in this record")
    return parser.parse_args(argv)
