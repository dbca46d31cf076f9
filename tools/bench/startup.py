"""From nothing to a reply: imports, scripts, further procs, and their end."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from . import limits
from .lab import Lab, Measure, in_turns, timed
from .rows import Goal, Row
from .subject import WAIT_S, TorchUse

_FORK_S: Final = 0.005
_IMPORT_TORCH_S: Final = 1.18
_SCRIPT_PROCS: Final = 8


def _import() -> Measure:
    row = Row(
        name="import",
        title="import of the package",
        unit="ms",
        limit_name="import zmq",
        anchor=17,
        goal=Goal(at_most=80),
    )

    def run(lab: Lab) -> None:
        lab.say(row.title)
        samples, limit = in_turns(
            max(3, lab.effort.starts),
            lambda: [limits.import_time(lab.subject.package)],
            lambda: [limits.import_time("zmq")],
        )
        lab.record(row, samples, limit=limit)

    return Measure(name=row.name, rows=(row,), run=run)


def _script(name: str, title: str, torch: TorchUse, goal: Goal) -> Measure:
    alone = torch is TorchUse.NOBODY
    row = Row(
        name=name,
        title=title,
        unit="s",
        limit_name="forked ZeroMQ workers" if alone else "one import of torch",
        anchor=0.30 if alone else _IMPORT_TORCH_S,
        goal=goal,
    )
    modules = () if alone else ("torch",)

    def run(lab: Lab) -> None:
        lab.say(title)
        source = lab.subject.script(_SCRIPT_PROCS, torch)
        samples, workers, one_import = in_turns(
            lab.effort.starts,
            lambda: [script_time(source)],
            lambda: [limits.start_time(_SCRIPT_PROCS, *modules)] if alone or lab.effort.thorough else [],
            lambda: [limits.import_time(*modules)] if modules else [],
            warm_up=lab.effort.thorough,
        )
        if alone:
            lab.record(row, samples, limit=workers)
        else:
            lab.record(row, samples, limit=one_import, beside={"forked ZeroMQ workers with torch": workers})

    return Measure(name=name, rows=(row,), run=run)


def _spawn(num_procs: int, *, torch: bool) -> Measure:
    warm_eight = torch and num_procs == 8
    row = Row(
        name=f"spawn-{num_procs}" + ("-torch" if torch else ""),
        title=f"{num_procs} further proc{'s' if num_procs > 1 else ''}, warm, with{'' if torch else 'out'} torch",
        unit="s",
        limit_name=f"{num_procs} fork{'s' if num_procs > 1 else ''}",
        anchor=num_procs * _FORK_S if warm_eight else None,
        goal=Goal(at_most=0.15) if warm_eight else None,
    )

    def run(lab: Lab) -> None:
        lab.group(1, torch=torch)
        lab.say(row.title)

        def spawn() -> list[float]:
            start = time.perf_counter()
            with lab.fresh_group(num_procs, torch=torch):
                return [time.perf_counter() - start]

        nursery = limits.Nursery(*(["torch"] if torch else []))
        with limits.closing_all(nursery):
            # The group above, and a spare fork, have warmed up both sides.
            nursery.fork_time(1)
            samples, limit = in_turns(
                lab.effort.rounds, spawn, lambda: [nursery.fork_time(num_procs)], warm_up=lab.effort.thorough
            )
        lab.record(row, samples, limit=limit)

    return Measure(name=row.name, rows=(row,), run=run)


def _stop() -> Measure:
    row = Row(
        name="stop-8",
        title="stop of 8 procs",
        unit="s",
        limit_name="forked ZeroMQ workers",
        anchor=0.03,
        goal=Goal(at_most=0.2),
    )

    def run(lab: Lab) -> None:
        lab.say(row.title)
        nursery = limits.Nursery()

        def stop() -> list[float]:
            group = lab.subject.spawn(8)
            group.call_all()
            return [timed(group.stop)]

        def stop_limit() -> list[float]:
            nursery.fork_workers(8)
            return [nursery.stop_workers()]

        with limits.closing_all(nursery):
            samples, limit = in_turns(lab.effort.rounds, stop, stop_limit)
        lab.record(row, samples, limit=limit)

    return Measure(name=row.name, rows=(row,), run=run)


def script_time(source: str) -> float:
    """Run a script in a fresh interpreter; return the seconds until the time that it printed.

    Raises:
        RuntimeError: It failed.
        subprocess.TimeoutExpired: It did not end within ``WAIT_S``.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        path = Path(directory) / "script.py"
        path.write_text(source)
        start = time.monotonic()
        done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=WAIT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"the script ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
    return float(done.stdout.split()[-1]) - start


MEASURES: Final = (
    _import(),
    _script("start-8", "script start to reply of 8 procs", TorchUse.NOBODY, Goal(times=1.5)),
    _script("start-8-torch", "the same, torch in the workers", TorchUse.WORKERS, Goal(times=1.6)),
    _script("start-8-torch-both", "the same, torch in the script too", TorchUse.EVERYBODY, Goal(times=2.3)),
    *(_spawn(num_procs, torch=torch) for torch in (False, True) for num_procs in (1, 8, 32)),
    _stop(),
)
