"""`danaus run --nproc N SCRIPT`: a script written for torchrun, unchanged, on the processes of a mesh.

The mesh is on this host, on hosts where `danaus host` runs, or on those of a job. As under torchrun, the loss of any
rank ends all of them, and the script starts again on all as often as `--restart` allows. What the ranks write is shown
with their numbers. The exit code is that of the rank that failed.
"""

from __future__ import annotations

import math
import operator
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..runtime import Restart, attach_to_hosts, shutdown_context, this_host
from ..runtime.errors import DanausError, SupervisionError
from ..runtime.failure import FailureKind

if TYPE_CHECKING:
    import argparse

    from ..runtime import HostMesh, MeshFailure

TERM_LIMIT_S: Final = 10.0
"""How long scripts may take to end once they were sent SIGTERM."""

_POLL_S: Final = 0.02
_PACKAGE: Final = __name__.partition(".")[0]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `danaus run` takes for scripts written for torchrun."""
    group = parser.add_argument_group("scripts written for torchrun")
    group.add_argument("--nproc", type=int, metavar="N", help="run SCRIPT on N processes of each host")
    group.add_argument("--restart", type=int, default=0, metavar="N", help="start again at most N times (default: 0)")
    group.add_argument(
        "--hosts",
        action="extend",
        default=[],
        type=lambda text: text.split(","),
        metavar="ADDRESS,...",
        help="where `danaus host` listens, as tcp://HOST:PORT, instead of this host",
    )
    group.add_argument("--key", metavar="FILE", help="key file of these hosts")
    group.add_argument(
        "--job",
        metavar="JOB",
        help="hosts of a job: its file, or the name of one that runs; started if it does not run",
    )
    group.add_argument(
        "--preload", action="append", default=[], metavar="MODULE", help="found imported by SCRIPT, beside torch"
    )
    group.add_argument(
        "--gpus",
        choices=["own", "shared", "none"],
        default="own",
        help="where there are GPUs: one for each process (default), several processes to one, or none",
    )


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a message where the options contradict each other."""
    if options.nproc is None:
        names = ("restart", "hosts", "key", "job", "preload")
        given = next((name for name in names if getattr(options, name)), "gpus" if options.gpus != "own" else None)
        if given is not None:
            parser.error(f"--{given} is for scripts written for torchrun: give --nproc as well")
    elif options.nproc < 1:
        parser.error(f"--nproc {options.nproc}: give the number of processes on each host, 1 or more")
    elif options.restart < 0:
        parser.error(f"--restart {options.restart}: give a number of restarts, 0 or more")
    elif options.hosts and options.job:
        parser.error("--hosts and --job: give one of them")
    elif bool(options.hosts) != bool(options.key):
        parser.error("--hosts and --key belong together: the hosts, and the key file that they were started with")


def run_spmd(options: argparse.Namespace) -> int:
    """Run a script on every process; return the exit code."""
    is_here = not options.hosts and not options.job
    if is_here and not options.is_module and not os.path.exists(options.script):
        print(f"danaus run: cannot open {options.script!r}: No such file or directory", file=sys.stderr)
        return 1
    # A loss is told below, and answered by the exit code.
    sys.modules[_PACKAGE].unhandled_fault_hook = _ignore  # type: ignore[attr-defined]
    try:
        code, text = _run(_hosts(options), options)
    except KeyboardInterrupt:
        code, text = 128 + signal.SIGINT, ""
    shutdown_context().get()
    if text:
        print(f"danaus run: {text}", file=sys.stderr)
    return code


def _hosts(options: argparse.Namespace) -> HostMesh:
    if options.hosts:
        return attach_to_hosts(options.hosts, key=options.key)
    if not options.job:
        return this_host()
    from ..runtime.jobs.job import load_job
    from ..runtime.jobs.job_file import is_job_file, read_job_file

    job = read_job_file(options.job) if is_job_file(options.job) else load_job(options.job)
    return job.hosts()


def _run(hosts: HostMesh, options: argparse.Namespace) -> tuple[int, str]:
    preload = list(dict.fromkeys(["torch", f"{_PACKAGE}.actors.spmd", *options.preload]))
    restart = Restart(scope="mesh", max_restarts=options.restart, within_s=math.inf) if options.restart else None
    name = options.script.rpartition(".")[2] if options.is_module else Path(options.script).stem
    procs = hosts.spawn_procs({"procs": options.nproc}, name=name, preload=preload, gpus=options.gpus, restart=restart)
    try:
        # While the processes start: it takes as long.
        from ..actors.spmd import SPMDActor

        spmd: Any = procs.spawn("spmd", SPMDActor, max_restarts=options.restart, preload=preload)
        arguments = [*(["-m"] if options.is_module else []), options.script, *options.arguments]
        return _run_with_restarts(spmd, arguments, options.restart)
    finally:
        procs.stop(grace=TERM_LIMIT_S).get()


def _run_with_restarts(spmd: Any, arguments: list[str], max_restarts: int) -> tuple[int, str]:
    before: list[int] = []
    for restarts in range(max_restarts + 1):
        try:
            before = _wait_all_new(spmd, before)
            spmd.main.call(arguments, restart_count=restarts, as_process=True).get()
        except SupervisionError as error:
            if restarts == max_restarts or not error.failure.restarts:
                failure = error.failure.root
                return _exit_code(failure), _lost(failure, restarts)
            print(f"danaus run: starting again ({restarts + 1} of {max_restarts})", file=sys.stderr)
        except (DanausError, TimeoutError) as error:
            return 1, str(error)
        else:
            break
    return 0, ""


def _wait_all_new(spmd: Any, before: list[int]) -> list[int]:
    """Wait until every rank has been started again since ``before``; return the incarnations.

    Else the script would begin on ranks that are about to be ended.

    Raises:
        SupervisionError: A rank is not started again.
    """
    while True:
        try:
            now = list(spmd.incarnation.call().get().values())
        except SupervisionError as error:
            if not before or not error.failure.restarts:
                raise
        else:
            if not before or all(map(operator.gt, now, before)):
                return now
        time.sleep(_POLL_S)


def _exit_code(failure: MeshFailure) -> int:
    if failure.kind is FailureKind.EXITED:
        return failure.exit_code or 1
    return 128 + failure.signum if failure.signum else 1


def _lost(failure: MeshFailure, restarts: int) -> str:
    after = f", after {restarts} restart{'s' if restarts > 1 else ''}" if restarts else ""
    where = f"host {failure.host}" + (f", pid {failure.pid}" if failure.pid else "")
    return f"{failure.mesh} rank {failure.rank} ({where}) {failure.how}{after}"


def _ignore(_failure: MeshFailure) -> None:
    return
