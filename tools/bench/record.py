"""A run of the benchmark as JSON: every raw sample, and what is needed to read it later."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

from .rows import Goal, Result, Row, judge

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FORMAT: Final = 1
_PACKAGES: Final = ("danaus", "pyzmq", "msgpack", "cloudpickle", "numpy", "torch", "torchmonarch", "ray")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run: where, when, of what, and all of its rows."""

    subject: str
    date: str
    effort: str
    machine: dict[str, str]
    versions: dict[str, str]
    rows: Sequence[tuple[Row, Result]]


def describe_machine() -> dict[str, str]:
    """Return what a reader needs to compare figures: processor, cores, memory, kernel, load."""
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_gib:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "load at start": f"{os.getloadavg()[0]:.2f}",
    }


def describe_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that bear on the figures, where installed."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def now() -> str:
    """Return the local date and time with its offset."""
    return time.strftime("%Y-%m-%d %H:%M %z")


def to_json(record: Record) -> str:
    """Return ``record`` as JSON; each row also carries its summary, for readers without this program."""
    rows = [_row_to_dict(row, result) for row, result in record.rows]
    fields = {name: getattr(record, name) for name in ("subject", "date", "effort", "machine", "versions")}
    return json.dumps({"format": FORMAT, **fields, "rows": rows}, indent=1)


def from_json(text: str) -> Record:
    """Return the record that :func:`to_json` wrote.

    Raises:
        ValueError: The text is no such record, or of another format.
    """
    try:
        fields = json.loads(text)
        if fields["format"] != FORMAT:
            raise ValueError(f"the record has format {fields['format']}, this program reads {FORMAT}; measure anew")
        rows = [_row_from_dict(each) for each in fields.pop("rows")]
        del fields["format"]
        return Record(rows=rows, **fields)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"no record of `danaus bench --json`: {error!r}") from error


def read(path: Path) -> Record:
    """Return the record in a file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds no record.
    """
    try:
        return from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _row_to_dict(row: Row, result: Result) -> dict[str, Any]:
    summary = dataclasses.asdict(judge(row, result))
    summary["verdict"] = summary["verdict"].value
    return {"row": dataclasses.asdict(row), "result": dataclasses.asdict(result), "summary": summary}


def _row_from_dict(fields: dict[str, Any]) -> tuple[Row, Result]:
    goal = fields["row"].pop("goal")
    result = fields["result"]
    for name in ("samples", "limit", "base"):
        result[name] = tuple(result[name])
    result["beside"] = {label: tuple(taken) for label, taken in result["beside"].items()}
    return Row(goal=None if goal is None else Goal(**goal), **fields["row"]), Result(**result)


def _processor() -> str:
    with open("/proc/cpuinfo") as cpuinfo:
        for line in cpuinfo:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
