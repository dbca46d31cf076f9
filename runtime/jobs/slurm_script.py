"""The batch script of a SlurmJob, and the command lines around it: text from a spec, nothing is run here.

Each node runs one step, ``host-INDEX``, which is one daemon: it can be cancelled alone, and what ends it leaves the
other nodes and the allocation as they are. A signal from Slurm (preemption, time limit, scancel) reaches the daemons.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from .spec import JobSpec

if TYPE_CHECKING:
    from pathlib import Path

HOST_MODULE: Final = "danaus.runtime.jobs.slurm_host"

_SCRIPT: Final = """\
#!/bin/bash
{options}
umask 077
# Slurm tells the hosts of a signal itself; this script stays until they have ended.
trap : TERM
{setup}directory={directory}
index=0
for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    name="$SLURM_JOB_ID.$index"
    (
        srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap --cpu-bind=none \\
            --job-name="host-$index" --output="$directory/host-$name.log" --open-mode=append \\
            {command} --directory "$directory" --name "$name"{interface}
        echo $? >"$directory/ended-$name.part"
        mv "$directory/ended-$name.part" "$directory/ended-$name"
    ) &
    index=$((index + 1))
done
while [ -n "$(jobs -rp)" ]; do wait; done
"""

_TIME: Final = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")


@dataclass(frozen=True, kw_only=True)
class SlurmSpec(JobSpec):
    """What a :class:`~.slurm_job.SlurmJob` submits."""

    kind: ClassVar[str] = "slurm"

    nodes: int
    """How many nodes, in one allocation; each is a host."""
    partition: str = ""
    """Slurm's choice by default."""
    time: str = ""
    """Limit as sbatch takes it: minutes, ``HH:MM:SS`` or ``D-HH:MM:SS``; the partition's by default."""
    gpus_per_node: int = 0
    """How many GPUs the hosts have."""
    account: str = ""
    """Whom it is charged to."""
    share_node: bool = False
    """Whether other jobs may run on the nodes too: then ask for cores and memory by ``sbatch_args``."""
    sbatch_args: tuple[str, ...] = ()
    """Further options of sbatch, as ``--qos=high`` or ``--constraint=h100``."""
    setup: tuple[str, ...] = ()
    """Lines of bash that run first, on the first node, as ``module load cuda``; what they export reaches the hosts."""
    python: str = sys.executable
    """The interpreter on the nodes, of an environment that has danaus; by default that of this script."""
    directory: str = ""
    """A folder that this machine and all nodes see, for key and output; by default that of the user's state."""
    interface: str = ""
    """Network interface that the daemons listen on, as ``ib0``; by default that of the nodes' addresses in Slurm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sbatch_args", "setup"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise TypeError(f"SlurmJob({name}={value!r}): expected a list of texts, as {name}=[{value!r}]")
            object.__setattr__(self, name, tuple(value))
        if not isinstance(self.nodes, int) or self.nodes < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"SlurmJob(nodes={self.nodes!r}): expected a number of nodes, 1 or more")
        if not isinstance(self.gpus_per_node, int) or self.gpus_per_node < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"SlurmJob(gpus_per_node={self.gpus_per_node!r}): expected a number of GPUs, 0 or more")
        object.__setattr__(self, "time", str(self.time))
        if self.time and not _TIME.fullmatch(self.time):
            raise ValueError(f"SlurmJob(time={self.time!r}): expected minutes, 'HH:MM:SS' or 'D-HH:MM:SS'")
        wrong = [argument for argument in self.sbatch_args if not argument.startswith("-") or "\n" in argument]
        if wrong:
            raise ValueError(f"SlurmJob(sbatch_args={wrong}): expected options of sbatch, each as '--option=value'")


def batch_script(spec: SlurmSpec, directory: Path, *, nodes: int, time: str) -> str:
    """Return the script that sbatch takes.

    Args:
        spec: What is asked for.
        directory: The job's folder.
        nodes: How many nodes: those of the spec, or one in the place of a lost one.
        time: The limit; empty for the partition's.
    """
    options = [
        f"--job-name={job_name(spec)}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--output={directory}/batch-%j.log",
        # Started again, it would have other nodes under the same id.
        "--no-requeue",
        # A node that fails does not take the others with it.
        "--no-kill",
    ]
    options += [] if spec.share_node else ["--exclusive", "--mem=0"]
    chosen = {"partition": spec.partition, "time": time, "account": spec.account}
    options += [f"--{name}={value}" for name, value in chosen.items() if value]
    options += [f"--gpus-per-node={spec.gpus_per_node}"] if spec.gpus_per_node else []
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH {option}" for option in [*options, *spec.sbatch_args]),
        setup="".join(f"{line}\n" for line in spec.setup),
        directory=shlex.quote(str(directory)),
        command=shlex.join([spec.python, "-m", HOST_MODULE]),
        interface=f" --interface {shlex.quote(spec.interface)}" if spec.interface else "",
    )


def job_name(spec: SlurmSpec) -> str:
    """Return the name under which squeue lists it."""
    return f"danaus-{spec.name}"
