"""Processes, meshes, actors, calls: everything a controller script imports, from here or from ``danaus`` itself."""

from .accumulator import Accumulator
from .actor import Actor, concurrent_endpoint, endpoint
from .actor_mesh import ActorMesh, as_endpoint
from .adverbs import Endpoint, send
from .context import Context, context, current_actor_name, current_rank, current_size, shutdown_context
from .errors import (
    ActorError,
    AdmissionError,
    CallCancelledError,
    CallTimeoutError,
    DanausError,
    GroupBroken,
    MailboxFull,
    MessageError,
    SpawnError,
    StoppedError,
    SupervisionError,
)
from .failure import FailureKind, MeshFailure
from .future import Future
from .groups import device_mesh, process_group
from .mesh import HostMesh, ProcMesh, this_host, this_proc
from .port import Channel, Port, PortReceiver
from .registry import get_or_spawn_controller
from .scatter import scatter
from .shape import Extent, Point, Region
from .value_mesh import ValueMesh

__all__ = [
    "Accumulator",
    "Actor",
    "ActorError",
    "ActorMesh",
    "AdmissionError",
    "CallCancelledError",
    "CallTimeoutError",
    "Channel",
    "Context",
    "DanausError",
    "Endpoint",
    "Extent",
    "FailureKind",
    "Future",
    "GroupBroken",
    "HostMesh",
    "MailboxFull",
    "MeshFailure",
    "MessageError",
    "Point",
    "Port",
    "PortReceiver",
    "ProcMesh",
    "Region",
    "SpawnError",
    "StoppedError",
    "SupervisionError",
    "ValueMesh",
    "as_endpoint",
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
]
