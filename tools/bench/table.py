"""The benchmark's table, and what is said under it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from .rows import Judgement, Result, Row, Verdict, goal_text, judge, median

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .record import Record

_STYLES: Final = {
    Verdict.REACHED: "green",
    Verdict.MISSED: "red",
    Verdict.VOID: "yellow",
    Verdict.FAILED: "bold red",
    Verdict.ABSENT: "dim",
    Verdict.MEASURED: "",
}


def build(record: Record) -> Any:
    """Return a rich table of the record's rows."""
    from rich.table import Table

    table = Table(header_style="bold")
    table.add_column("measure", overflow="fold", min_width=28)
    for column in (f"{record.subject} p50", "p99", "limit", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("goal", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for row, result in record.rows:
        judgement = judge(row, result)
        style = _STYLES[judgement.verdict]
        verdict = f"[{style}]{judgement.verdict.value}[/]" if style else judgement.verdict.value
        table.add_row(row.title, *figures(row, judgement), goal_text(row), verdict)
    return table


def figures(row: Row, judgement: Judgement) -> tuple[str, str, str, str]:
    """Return p50, p99, limit and ratio as text; empty where there is none."""
    ratio = "" if judgement.ratio is None else f"{judgement.ratio:.2f}"
    p50, p99, limit = (show(each, row.unit) for each in (judgement.p50, judgement.p99, judgement.limit))
    return p50, p99, limit, ratio


def show(value: float | None, unit: str) -> str:
    """Return a figure with three significant digits and its unit."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f} {unit}"
    return f"{value:.3g} {unit}"


def heading(record: Record) -> str:
    """Return a line that says what was measured, when and where."""
    machine = record.machine
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['memory']}, {machine['system']}"
    return f"{record.subject}, {record.date}, {record.effort}; {where}; {versions}"


def notes(rows: Sequence[tuple[Row, Result]]) -> list[str]:
    """Return a line for every row that did not reach its goal, with the reason, and the figures beside the rows."""
    lines: list[str] = []
    for row, result in rows:
        judgement = judge(row, result)
        if judgement.why:
            lines.append(f"{row.title}: {judgement.verdict.name.lower()}: {judgement.why}")
        beside = {row.base_name: result.base, **result.beside}
        shown = [f"{label} {show(median(values), row.unit)}" for label, values in beside.items() if values]
        if shown:
            lines.append(f"{row.title}: beside it {', '.join(shown)}")
    return lines
