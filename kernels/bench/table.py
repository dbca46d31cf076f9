"""The table: as text for the terminal, as Markdown between two marks of README.md, merged row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .rows import OURS, Row

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from .case import Case

BEGIN = "<!-- bench: begin -->"
END = "<!-- bench: end -->"
NOT_MEASURED = "not measured"
_HEAD = ("kernel", "shape", "here", "beside it", "goal: good / top", "measured")


def cells(row: Row) -> tuple[str, ...]:
    """Return the row's cells as words."""
    goal = (
        "" if row.good is None else f"{row.good:g} / {row.top:g} {row.unit}" if row.top else f"{row.good:g} {row.unit}"
    )
    if row.problem:
        return (row.name, row.shape, f"FAILED: {row.problem}".replace("|", "/"), "", goal, row.measured)
    ours = _number(row, OURS)
    verdict = row.verdict()
    others = [f"{name} {_number(row, name)}" for name in row.times_us if name != OURS]
    others += [f"{name}: {why}" for name, why in row.absent.items()]
    here = f"{ours} ({verdict})" if verdict else ours
    measured = row.measured or NOT_MEASURED
    others = [text.replace("|", "/") for text in others]
    return (row.name, row.shape, here if row.measured else NOT_MEASURED, "; ".join(others), goal, measured)


def render_text(rows: Iterable[Row]) -> str:
    """Return the rows with aligned columns, the stamp left out."""
    lines = [_HEAD[:-1], *(cells(row)[:-1] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def merge(path: Path, rows: Sequence[Row], cases: Sequence[Case]) -> None:
    """Write the table of all ``cases`` to the file: ``rows`` where measured, else what it holds, else "not measured".

    Raises:
        ValueError: The file lacks the two marks.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path}: the table goes between a line {BEGIN} and a line {END}, each once")
    before, rest = text.split(BEGIN)
    old, after = rest.split(END)
    known = {(line[0], line[1]): line for line in _parse(old)}
    known |= {(row.name, row.shape): cells(row) for row in rows if row.measured}
    lines = [known.get((case.name, case.shape), cells(Row.not_measured(case))) for case in cases]
    table = [_HEAD, tuple("---" for _ in _HEAD), *lines]
    body = "\n".join("| " + " | ".join(line) + " |" for line in table)
    path.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}", encoding="utf-8")


def _parse(table: str) -> list[tuple[str, ...]]:
    """The measured rows that a table holds; others are made anew."""
    lines = [line.strip().strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    rows = [tuple(cell.strip() for cell in line) for line in lines]
    return [row for row in rows[1:] if len(row) == len(_HEAD) and row[-1] not in {NOT_MEASURED, "---"}]


def _number(row: Row, variant: str) -> str:
    value, time_us = row.value(variant), row.times_us.get(variant)
    if time_us is None:
        return "-"
    took = f"{time_us / 1e3:.2f} ms" if time_us >= 1e3 else f"{time_us:.1f} us"
    return took if value is None else f"{value:.3g} {row.unit}, {took}"
