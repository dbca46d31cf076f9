"""Jobs: hosts from this machine, over SSH, from Slurm, Kubernetes or Ray, by one interface."""

from .errors import JobError, JobSpecError, JobTimeoutError, LaunchError
from .job import Job, load_job
from .kubernetes_job import KubernetesJob
from .local_job import LocalJob
from .ray_job import RayJob
from .slurm_job import SlurmJob
from .spec import HostRecord, JobSpec, JobState
from .ssh_job import SSHJob
from .state import saved_jobs

__all__ = [
    "HostRecord",
    "Job",
    "JobError",
    "JobSpec",
    "JobSpecError",
    "JobState",
    "JobTimeoutError",
    "KubernetesJob",
    "LaunchError",
    "LocalJob",
    "RayJob",
    "SSHJob",
    "SlurmJob",
    "load_job",
    "saved_jobs",
]
