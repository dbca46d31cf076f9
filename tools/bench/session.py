"""One run of the benchmark, from the choice of measures to the table."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import bulk, cut, failure, hosts, latency, memory, payloads, record, repair, scale, startup, table, throughput
from .compare import regressions
from .lab import FULL, QUICK, Lab, Measure
from .peers import load_peer
from .rows import Result, Verdict, judge
from .subject import AbsentError, Subject

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from .record import Record
    from .rows import Row

_WIDTH_IN_A_FILE: Final = 130
_INTERRUPTED: Final = 130
# Memory first, before this process has imported what the payloads need.
_PARTS: Final = (memory, startup, latency, throughput, failure, repair, payloads, bulk, hosts, cut, scale)
MEASURES: Final[tuple[Measure, ...]] = tuple(itertools.chain.from_iterable(part.MEASURES for part in _PARTS))


def run(options: argparse.Namespace) -> int:
    """Run the benchmark as ``options`` say; return the exit code.

    Raises:
        ValueError: No measure has a chosen name, or a record to compare with is none.
        ImportError: The peer is not installed.
        OSError: A file cannot be read or written.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_IN_A_FILE)
    chosen = choose(MEASURES, options.only, large=options.large)
    if options.list:
        for measure in chosen:
            console.print(f"{measure.name}: {', '.join(row.title for row in measure.rows)}", highlight=False)
        return 0
    old = None if options.compare is None else record.read(options.compare)
    new, interrupted = _measure(_subject(options.peer), chosen, console, quick=options.quick)
    if options.json is not None:
        options.json.write_text(record.to_json(new))
    _print(console, new)
    failed = any(judge(row, result).verdict is Verdict.FAILED for row, result in new.rows)
    worse = old is not None and _print_regressions(console, old, new)
    return _INTERRUPTED if interrupted else 1 if failed or worse else 0


def choose(measures: Sequence[Measure], only: Sequence[str], *, large: bool) -> list[Measure]:
    """Return the measures whose names, or whose rows' names, start with one of ``only``; all where that is empty.

    Raises:
        ValueError: A name fits no measure.
    """
    wanted = [name.strip() for text in only for name in text.split(",") if name.strip()]
    names = {measure.name: [measure.name, *(row.name for row in measure.rows)] for measure in measures}
    for name in wanted:
        if not any(each.startswith(name) for group in names.values() for each in group):
            raise ValueError(f"--only {name}: no measure starts so; there are {', '.join(names)}")
    if not wanted:
        return [measure for measure in measures if large or not measure.only_large]
    return [measure for measure in measures if any(each.startswith(tuple(wanted)) for each in names[measure.name])]


def _subject(peer: str | None) -> Subject:
    if peer is not None:
        return load_peer(peer)
    from .ours import Danaus

    return Danaus()


def _measure(subject: Subject, chosen: Sequence[Measure], console: Console, *, quick: bool) -> tuple[Record, bool]:
    """Return the record, and whether Ctrl-C cut it short."""
    interrupted = False
    effort = QUICK if quick else FULL
    machine = record.describe_machine()
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # Drawn only between blocks: a thread that draws would disturb what is measured.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("opening", total=len(chosen))

        def say(what: str) -> None:
            progress.update(task, description=what, refresh=True)

        lab = Lab(subject, effort, say=say)
        subject.open()
        try:
            for measure in chosen:
                run_measure(lab, measure)
                progress.advance(task)
        except KeyboardInterrupt:
            interrupted = True
            console.print("interrupted; what has been measured follows")
        finally:
            say("ending")
            lab.forget()
            _close(subject, console)
    rows = [(row, lab.results[row.name]) for measure in chosen for row in measure.rows if row.name in lab.results]
    new = record.Record(
        subject=subject.name,
        date=record.now(),
        effort=effort.name,
        machine=machine,
        versions=record.describe_versions(),
        rows=rows,
    )
    return new, interrupted


def _close(subject: Subject, console: Console) -> None:
    try:
        subject.close()
    except Exception as error:  # noqa: BLE001  the figures must not be lost with it
        console.print(
            f"{subject.name} did not end well: {type(error).__name__}: {error}", highlight=False, markup=False
        )


def run_measure(lab: Lab, measure: Measure) -> None:
    """Run one measure; what it raises becomes the result of the rows that it leaves open, and the others go on."""
    try:
        measure.run(lab)
    except AbsentError as absent:
        _fill(lab, measure.rows, Result(absent=str(absent)))
    except Exception as error:  # noqa: BLE001  whatever a runtime raises, the other measures go on
        _fill(lab, measure.rows, Result(error=f"{type(error).__name__}: {error}"))
        # Its meshes may be in any state.
        lab.forget()


def _fill(lab: Lab, rows: Sequence[Row], result: Result) -> None:
    for row in rows:
        lab.results.setdefault(row.name, result)


def _print(console: Console, new: Record) -> None:
    console.print(table.heading(new), highlight=False, markup=False)
    console.print(table.build(new))
    for line in table.notes(new.rows):
        console.print(line, highlight=False, markup=False)


def _print_regressions(console: Console, old: Record, new: Record) -> bool:
    found = regressions(old.rows, new.rows)
    console.print(
        f"against {old.subject}, {old.date}: {len(found)} worse" if found else f"nothing is worse than on {old.date}"
    )
    for regression in found:
        console.print(f"  {regression}", highlight=False, markup=False)
    return bool(found)
