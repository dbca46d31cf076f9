"""Hosts from Slurm: one allocation of nodes, a daemon on each, found again through shared storage."""

from __future__ import annotations

import os
import time as clock
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from ..host.descendants import JOB_VARIABLE
from .errors import SHOWN_LINES, JobError, LaunchError
from .job import Job
from .launch import Output, read_ready, run_tool, tail
from .slurm_script import SlurmSpec, batch_script, job_name
from .spec import HostRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .state import Record

TOOL_LIMIT_S: Final = 60.0
END_GRACE_S: Final = 15.0
"""Time for daemons to end their agents after SIGTERM: more than actors have to drain by default."""
END_LIMIT_S: Final = 90.0
"""How long Slurm may take to end steps: its KillWait is 30 s by default."""
END_POLL_S: Final = 0.2

QUEUED: Final = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD"})
RUNNING: Final = frozenset({"RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"})
_DELIMITER: Final = "|"


class SlurmJob(Job[SlurmSpec]):
    """Hosts from Slurm: ``nodes`` nodes in one allocation, submitted by sbatch, one daemon on each.

    The job runs until its time limit, :meth:`kill` or ``scancel``; the script may end and another one attach. Signals
    from Slurm reach the daemons: SIGTERM is a preemption, which actors are told of.

    Args:
        nodes: How many.
        partition: Slurm's choice by default.
        time: Limit: minutes, ``HH:MM:SS`` or ``D-HH:MM:SS``; the partition's by default.
        gpus_per_node: How many GPUs the hosts have.
        account: Whom it is charged to.
        share_node: Whether other jobs may run on the nodes too; by default they are exclusive.
        sbatch_args: Further options of sbatch, as ``--qos=high``.
        setup: Lines of bash that run first, as ``module load cuda``.
        python: The interpreter on the nodes; by default that of this script.
        directory: A folder that this machine and all nodes see; by default that of the user's state.
        interface: Network interface that the daemons listen on, as ``ib0``.
        name: By which other scripts find the job.
        replace_lost: How many lost hosts are replaced, each by a further job of one node, for the time that is left.
    """

    default_timeout_s: ClassVar[float] = 600.0
    poll_s: ClassVar[float] = 5.0

    def __init__(
        self,
        *,
        nodes: int,
        partition: str = "",
        time: str | int = "",
        gpus_per_node: int = 0,
        account: str = "",
        share_node: bool = False,
        sbatch_args: Sequence[str] = (),
        setup: Sequence[str] = (),
        python: str = "",
        directory: str = "",
        interface: str = "",
        name: str = "",
        replace_lost: int = 0,
    ) -> None:
        optional = {"python": python} if python else {}
        spec = SlurmSpec(
            nodes=nodes,
            partition=partition,
            time=time,  # type: ignore[arg-type]
            gpus_per_node=gpus_per_node,
            account=account,
            share_node=share_node,
            sbatch_args=sbatch_args,  # type: ignore[arg-type]
            setup=setup,  # type: ignore[arg-type]
            directory=directory,
            interface=interface,
            name=name,
            replace_lost=replace_lost,
            **optional,
        )
        super().__init__(spec)

    def render(self) -> str:
        directory = self._file.directory(self._directory())
        return batch_script(self.spec, directory, nodes=self.spec.nodes, time=self.spec.time)

    def logs(self, host: int, *, lines: int = 200) -> str:
        record = self._record()
        return _log(Path(record.directory), record.launched["hosts"][host], lines)

    def _directory(self) -> str | None:
        return self.spec.directory or None

    def _launch(self, directory: Path, key_file: Path) -> dict[str, Any]:  # noqa: ARG002  it lies in the folder
        job = self._submit(directory, nodes=self.spec.nodes, time=self.spec.time)
        return {"hosts": [f"{job}.{index}" for index in range(self.spec.nodes)]}

    def _observe(self, record: Record) -> tuple[list[HostRecord], str]:
        hosts: list[str] = record.launched["hosts"]
        jobs = self._queue()
        found = [_observe_host(Path(record.directory), index, name, jobs) for index, name in enumerate(hosts)]
        said = [f"Slurm job {job}: {' '.join(jobs.get(job, ('gone',))[:2])}" for job in _jobs_of(hosts)]
        return found, ", ".join(said)

    def _replace(self, record: Record, index: int) -> dict[str, Any]:
        """Submit a job of one node, for the time that the first one has left."""
        hosts = list(record.launched["hosts"])
        directory = Path(record.directory)
        job, _, number = hosts[index].partition(".")
        if not (directory / f"ended-{hosts[index]}").exists():
            self._cancel_host(job, number)
        first = _jobs_of(hosts)[0]
        left = self._queue().get(first, ("", "", ""))[2]
        if left and not left.strip("0:"):
            raise JobError(f"job {self.name!r}: Slurm job {first} has used all of its time limit")
        # Slurm writes INVALID or UNLIMITED where there is no limit to share.
        time = left if left and left[0].isdigit() else self.spec.time
        hosts[index] = f"{self._submit(directory, nodes=1, time=time)}.0"
        return {"hosts": hosts, "past": sorted({*record.launched.get("past", ()), job})}

    def _end(self, record: Record) -> None:
        jobs = sorted({*_jobs_of(record.launched["hosts"]), *record.launched.get("past", ())})
        run_tool(["scancel", "--state=PENDING", *jobs], timeout_s=TOOL_LIMIT_S)
        if any(host.status == "running" for host in self._observe(record)[0]):
            # The steps only: their batch script ends by itself, sooner than Slurm ends it.
            run_tool(["scancel", "--signal=TERM", *jobs], timeout_s=TOOL_LIMIT_S)
            if not self._wait_ended(jobs, END_GRACE_S):
                return
        # Jobs that are gone are no error; what is left of them is seen below.
        cancelled = run_tool(["scancel", *jobs], timeout_s=TOOL_LIMIT_S)
        left = self._wait_ended(jobs, END_LIMIT_S)
        if left:
            advice = f"Slurm has not ended {', '.join(left)} within {END_LIMIT_S:g} s: see squeue and sinfo -R"
            raise LaunchError(self.name, (cancelled.attempt("scancel"),), advice)

    def _wait_ended(self, jobs: Sequence[str], limit_s: float) -> list[str]:
        """Wait for the end of these jobs; return those that are left after the limit."""
        deadline_s = clock.monotonic() + limit_s
        while left := [job for job, fields in self._queue().items() if job in jobs and not _has_ended(fields[0])]:
            if clock.monotonic() > deadline_s:
                break
            clock.sleep(END_POLL_S)
        return left

    def _submit(self, directory: Path, *, nodes: int, time: str) -> str:
        """Submit a script; return the job's id."""
        script = batch_script(self.spec, directory, nodes=nodes, time=time)
        # An actor's own job ends what carries its mark.
        env = {name: value for name, value in os.environ.items() if name != JOB_VARIABLE}
        done = run_tool(["sbatch", "--parsable"], timeout_s=TOOL_LIMIT_S, stdin=script.encode(), env=env)
        if done.code != 0:
            advice = "SlurmJob(...).render() shows the script; sinfo lists partitions, nodes and limits"
            raise LaunchError(self.name, (done.attempt(f"{nodes} nodes"),), advice)
        # ID, or ID;CLUSTER.
        return done.out.strip().splitlines()[-1].partition(";")[0]

    def _cancel_host(self, job: str, number: str) -> None:
        """End the step of a host that is still there, as behind a link that is cut."""
        steps = self._ask(
            ["squeue", "--steps", "--noheader", f"--jobs={job}", f"--format=%i{_DELIMITER}%j"], may_fail=True
        )
        for line in steps.out.splitlines():
            step, _, name = line.strip().partition(_DELIMITER)
            if name == f"host-{number}":
                run_tool(["scancel", step], timeout_s=TOOL_LIMIT_S)

    def _queue(self) -> dict[str, tuple[str, ...]]:
        """What Slurm knows of the jobs of this name: id to state, reason and time left."""
        form = _DELIMITER.join(("%i", "%T", "%r", "%L"))
        name = f"--name={job_name(self.spec)}"
        done = self._ask(["squeue", "--noheader", "--states=all", name, f"--format={form}"])
        rows = [line.strip().split(_DELIMITER) for line in done.out.splitlines() if line.strip()]
        return {row[0]: tuple(row[1:]) for row in rows}

    def _ask(self, command: list[str], *, may_fail: bool = False) -> Output:
        done = run_tool(command, timeout_s=TOOL_LIMIT_S)
        if done.code != 0 and not may_fail:
            raise JobError(f"job {self.name!r}: Slurm does not answer: {done.attempt(command[0])}")
        return done


def _jobs_of(hosts: Sequence[str]) -> list[str]:
    """The ids of the jobs that these hosts are of, oldest first."""
    return list(
        dict.fromkeys(host.partition(".")[0] for host in sorted(hosts, key=lambda host: int(host.split(".")[0])))
    )


def _has_ended(state: str) -> bool:
    return state not in QUEUED | RUNNING | {"COMPLETING"}


def _observe_host(directory: Path, index: int, name: str, jobs: dict[str, tuple[str, ...]]) -> HostRecord:
    job = name.partition(".")[0]
    node = read_ready(directory / f"node-{name}")
    shown = f"{node}, Slurm job {job}" if node else f"Slurm job {job}"
    state, reason, *_ = jobs.get(job, ("gone", "", ""))
    address = read_ready(directory / f"ready-{name}")
    code = read_ready(directory / f"ended-{name}")
    if code or state not in QUEUED | RUNNING:
        why = f"its step ended with code {code}" if code else f"Slurm job {job} is {state} ({reason})"
        return HostRecord(index, shown, address, "ended", f"{why}\n{_log(directory, name, SHOWN_LINES)}".strip())
    if address:
        return HostRecord(index, shown, address, "running")
    return HostRecord(index, shown, "", "pending", f"{state}{f', {reason}' if reason not in {'', 'None'} else ''}")


def _log(directory: Path, name: str, lines: int) -> str:
    """What the daemon wrote, and before it started, what the batch script did."""
    batch = f"batch-{name.partition('.')[0]}.log"
    return tail(directory / f"host-{name}.log", lines) or tail(directory / batch, lines)
