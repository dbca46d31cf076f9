"""Which class each kind of job is; imported when it is asked for, since some need packages of their own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from .errors import JobError

if TYPE_CHECKING:
    from .job import Job
    from .state import Record

KINDS: Final = {
    "kubernetes": ("kubernetes_job", "KubernetesJob"),
    "local": ("local_job", "LocalJob"),
    "ray": ("ray_job", "RayJob"),
    "slurm": ("slurm_job", "SlurmJob"),
    "ssh": ("ssh_job", "SSHJob"),
}
"""Kind to its module in this folder and the class there."""


def class_of(kind: str) -> type[Job[Any]]:
    """Return the class of a kind of job.

    Raises:
        JobError: There is no such kind.
    """
    if kind not in KINDS:
        raise JobError(f"{kind!r} is no kind of job: expected one of {', '.join(KINDS)}")
    module, name = KINDS[kind]
    return getattr(importlib.import_module(f".{module}", __package__), name)


def job_of(record: Record) -> Job[Any]:
    """Return the job that ``record`` was kept of.

    Raises:
        JobError: Its fields are not those of its kind.
    """
    try:
        return class_of(record.kind)(**{**record.spec, "name": record.name})
    except (TypeError, ValueError) as error:
        raise JobError(f"the record of job {record.name!r} does not fit this version of danaus: {error}") from error
