"""The benchmark's command line: choose cases, check them, time or tune them, write the table.

A case whose results are wrong is not timed. Rows that a run did not measure keep what an earlier one wrote, so a long
list can be measured in parts.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .find import all_cases, choose
from .machine import machine
from .measure import check, measure
from .rows import Row
from .table import merge, render_text
from .tune import tune

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .case import Case

README = Path(__file__).parents[1] / "README.md"
USAGE_ERROR = 2


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return 1 if a result was wrong, 2 if the arguments are."""
    options = _parser().parse_args(arguments)
    try:
        cases = choose(all_cases(), options.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return USAGE_ERROR
    has_gpu = torch.cuda.is_available()
    if options.check:
        return _check_all(cases, torch.device("cuda" if has_gpu else "cpu"))
    if not has_gpu:
        print(f"No GPU here: {len(cases)} cases are listed, not measured; with one, the same command times them.\n")
        rows = [Row.not_measured(case) for case in cases]
        _write(rows, options)
    else:
        rows = _run(cases, options)
    print(render_text(rows))
    return int(any(row.problem for row in rows))


def _run(cases: Sequence[Case], options: argparse.Namespace) -> list[Row]:
    """Measure case by case, writing after each: what a run has done stays if it is cut off."""
    rows: list[Row] = []
    for case in cases:
        if options.tune:
            _tune(case)
        rows.append(_measure(case))
        _write(rows, options)
    return rows


def _write(rows: Sequence[Row], options: argparse.Namespace) -> None:
    if options.json is not None:
        record = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.readme.is_file():
        merge(options.readme, rows, all_cases())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m danaus.kernels.bench",
        description="Check the kernels against their references, time them beside torch's own, merge the table.",
    )
    parser.add_argument("--only", metavar="NAMES", help="cases by name or by how names begin, with commas between")
    parser.add_argument("--check", action="store_true", help="compare results on small inputs, time nothing")
    parser.add_argument("--tune", action="store_true", help="try the listed configurations first, keep the fastest")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number to FILE")
    parser.add_argument("--readme", type=Path, metavar="FILE", default=README, help="the file with the table")
    return parser


def _tune(case: Case) -> None:
    try:
        tune(case)
    except Exception:  # noqa: BLE001  one case must not end the run of the others
        traceback.print_exc()


def _measure(case: Case) -> Row:
    print(f"{case.name} ({case.shape})", file=sys.stderr, flush=True)
    try:
        return measure(case, torch.device("cuda"))
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        return Row.failed(case, f"{type(error).__name__}: {error}")


def _check_all(cases: Sequence[Case], device: torch.device) -> int:
    num_wrong = 0
    for case in cases:
        problems = check(case, device)
        num_wrong += bool(problems)
        print(f"{case.name} ({case.shape}): {'; '.join(problems) or 'ok'}", flush=True)
    return int(num_wrong > 0)
