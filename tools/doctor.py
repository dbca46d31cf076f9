"""`danaus doctor`: says what this machine has, what it lacks, and how to get it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import cache
from typing import TYPE_CHECKING

from ..runtime.host.devices import read_gpus
from .check import Check, Status, render
from .check_machine import check_machine
from .check_network import check_network
from .check_software import check_software, read_torch

if TYPE_CHECKING:
    from collections.abc import Sequence

SUMMARY = "say what this machine has, what is missing and how to get it"


def run_checks() -> list[Check]:
    """Look at everything; takes some tenths of a second."""
    return [*check_software(), *check_machine(), *check_network()]


@cache
def available_markers() -> frozenset[str]:
    """Return the test markers whose needs this machine meets, of ``gpu``, ``multi_gpu``, ``root``, ``torch``."""
    torch = read_torch()
    num_gpus = len(read_gpus().gpus) if torch is not None and torch.get("cuda") else 0
    has = {"torch": torch is not None, "gpu": num_gpus > 0, "multi_gpu": num_gpus > 1, "root": os.getuid() == 0}
    return frozenset(name for name, is_there in has.items() if is_there)


def is_usable(checks: Sequence[Check]) -> bool:
    """Whether nothing is missing that Danaus needs."""
    return all(check.status is not Status.MISSING for check in checks)


def main(arguments: Sequence[str]) -> int:
    """Print the findings; return 1 if something required is missing."""
    parser = argparse.ArgumentParser(prog="danaus doctor", description=SUMMARY)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options = parser.parse_args(arguments)
    checks = run_checks()
    if options.json:
        report = {
            "usable": is_usable(checks),
            "markers": sorted(available_markers()),
            "checks": [check.as_json() for check in checks],
        }
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        print("\n".join(render(checks)))
        print(f"\n{_verdict(checks)}")
    return 0 if is_usable(checks) else 1


def _verdict(checks: Sequence[Check]) -> str:
    missing = [check.name for check in checks if check.status is Status.MISSING]
    warnings = [check.name for check in checks if check.status is Status.WARNING]
    if missing:
        return f"Danaus does not run here until this is mended: {', '.join(missing)}."
    return f"Danaus runs here. Worth a look: {', '.join(warnings)}." if warnings else "Danaus runs here."
