"""Processes, meshes, actors, calls: everything a controller script imports, from here or from ``danaus`` itself.

actor, actor_mesh, mesh, host_mesh, context    what users write and hold
calls/          adverbs, futures, value meshes: how a call is made and answered
proc            a process's part in the runtime: its links, its actors, its I/O thread
keeping         what actors get back when they are started again
runner, handler, invoke             an actor's thread, and one call after another on it
messages/       envelopes, pickles, shared memory, links, credits
shapes/         extents, regions, slices
host/           the agent, its zygotes, the processes that they fork
network/        agents of several hosts: their tree, delivery between them, keys, the daemon that starts them
jobs/           hosts from SSH, Slurm, Kubernetes, Ray, or this machine
bulk/           remote buffers, and large arguments between hosts: streams that pass no agent
workspace/      the script's code on other hosts, and whether they have the same versions
collectives/    torch process groups
supervision/    what happens when a rank is lost: who is told, what is started again
controller, registry, log_printer   what the user's script runs beside itself
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from .actor import Actor, concurrent_endpoint, endpoint
from .actor_mesh import ActorMesh, as_endpoint
from .calls.accumulator import Accumulator
from .calls.adverbs import Endpoint, send
from .calls.future import Future
from .calls.port import Channel, Port, PortReceiver
from .calls.scatter import scatter
from .calls.value_mesh import ValueMesh
from .collectives.groups import device_mesh, process_group
from .context import Context, context, current_actor_name, current_rank, current_size, shutdown_context
from .errors import (
    ActorError,
    AdmissionError,
    CallCancelledError,
    CallTimeoutError,
    DanausError,
    DeadlockError,
    GroupBroken,
    MailboxFull,
    MessageError,
    SpawnError,
    StoppedError,
    SupervisionError,
)
from .failure import FailureKind, MeshFailure
from .host_mesh import HostMesh, this_host
from .keeping import checkpoint
from .lazy import late as _late
from .mesh import ProcMesh, this_proc
from .registry import get_or_spawn_controller
from .shapes.shape import Extent, Point, Region
from .supervision.elastic import Health
from .supervision.hook import unhandled_fault_hook
from .supervision.owned import Change
from .supervision.restart import Restart

if _TYPE_CHECKING:
    from . import testing as testing
    from .bulk.errors import BufferDropped, TransferError, TransferTimeoutError
    from .bulk.remote_buffer import RemoteBuffer
    from .jobs import Job, JobError, KubernetesJob, LocalJob, RayJob, SlurmJob, SSHJob, load_job
    from .network.attach import AttachError, attach_to_hosts
    from .workspace.errors import VersionMismatch, WorkspaceError
    from .workspace.sync import SyncReport

__getattr__ = _late(
    __name__,
    {
        "BufferDropped": ".bulk.errors",
        "TransferError": ".bulk.errors",
        "TransferTimeoutError": ".bulk.errors",
        "RemoteBuffer": ".bulk.remote_buffer",
        "Job": ".jobs",
        "JobError": ".jobs",
        "KubernetesJob": ".jobs",
        "LocalJob": ".jobs",
        "RayJob": ".jobs",
        "SSHJob": ".jobs",
        "SlurmJob": ".jobs",
        "load_job": ".jobs",
        "AttachError": ".network.attach",
        "attach_to_hosts": ".network.attach",
        "VersionMismatch": ".workspace.errors",
        "WorkspaceError": ".workspace.errors",
        "SyncReport": ".workspace.sync",
        "testing": ".testing",
    },
)

__all__ = [
    "Accumulator",
    "Actor",
    "ActorError",
    "ActorMesh",
    "AdmissionError",
    "AttachError",
    "BufferDropped",
    "CallCancelledError",
    "CallTimeoutError",
    "Change",
    "Channel",
    "Context",
    "DanausError",
    "DeadlockError",
    "Endpoint",
    "Extent",
    "FailureKind",
    "Future",
    "GroupBroken",
    "Health",
    "HostMesh",
    "Job",
    "JobError",
    "KubernetesJob",
    "LocalJob",
    "MailboxFull",
    "MeshFailure",
    "MessageError",
    "Point",
    "Port",
    "PortReceiver",
    "ProcMesh",
    "RayJob",
    "Region",
    "RemoteBuffer",
    "Restart",
    "SSHJob",
    "SlurmJob",
    "SpawnError",
    "StoppedError",
    "SupervisionError",
    "SyncReport",
    "TransferError",
    "TransferTimeoutError",
    "ValueMesh",
    "VersionMismatch",
    "WorkspaceError",
    "as_endpoint",
    "attach_to_hosts",
    "checkpoint",
    "concurrent_endpoint",
    "context",
    "current_actor_name",
    "current_rank",
    "current_size",
    "device_mesh",
    "endpoint",
    "get_or_spawn_controller",
    "load_job",
    "process_group",
    "scatter",
    "send",
    "shutdown_context",
    "this_host",
    "this_proc",
    "unhandled_fault_hook",
]
