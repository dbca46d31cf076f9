"""Processes, meshes, actors, calls: everything a controller script imports, from here or from ``danaus`` itself.

actor, actor_mesh, mesh, context    what users write and hold
calls/          adverbs, futures, value meshes: how a call is made and answered
proc            a process's part in the runtime: its links, its actors, its I/O thread
keeping         what actors get back when they are started again
runner, handler, invoke             an actor's thread, and one call after another on it
messages/       envelopes, pickles, shared memory, links, credits
shapes/         extents, regions, slices
host/           the agent, its zygotes, the processes that they fork
collectives/    torch process groups
supervision/    what happens when a rank is lost: who is told, what is started again
controller, registry, log_printer   what the user's script runs beside itself
"""

from . import testing as testing
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
from .keeping import checkpoint
from .mesh import HostMesh, ProcMesh, this_host, this_proc
from .registry import get_or_spawn_controller
from .shapes.shape import Extent, Point, Region
from .supervision.elastic import Health
from .supervision.hook import unhandled_fault_hook
from .supervision.owned import Change
from .supervision.restart import Restart

__all__ = [
    "Accumulator",
    "Actor",
    "ActorError",
    "ActorMesh",
    "AdmissionError",
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
    "MailboxFull",
    "MeshFailure",
    "MessageError",
    "Point",
    "Port",
    "PortReceiver",
    "ProcMesh",
    "Region",
    "Restart",
    "SpawnError",
    "StoppedError",
    "SupervisionError",
    "ValueMesh",
    "as_endpoint",
    "checkpoint",
    "concurrent_endpoint",
    "context",
    "current_actor_name",
    "current_rank",
    "current_size",
    "device_mesh",
    "endpoint",
    "get_or_spawn_controller",
    "process_group",
    "scatter",
    "send",
    "shutdown_context",
    "this_host",
    "this_proc",
    "unhandled_fault_hook",
]
