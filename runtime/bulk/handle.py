"""What travels in the place of a registered buffer: who owns it, where it lies, how to reach it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .layout import Layout

if TYPE_CHECKING:
    from .rdma import RdmaMemory


class Endpoint(NamedTuple):
    """Where an owner serves streams; parts that it has not are empty.

    Attributes:
        unix: Name of the abstract unix socket, for its own host.
        host: Address for other hosts.
        port: Port there, 0 where only its own host can reach it.
        scheme: ``"tls"``, or ``"tcp"`` where encryption was switched off.
    """

    unix: str = ""
    host: str = ""
    port: int = 0
    scheme: str = "tls"


class CudaMemory(NamedTuple):
    """How another process of the host opens CUDA memory.

    Attributes:
        uuid: The GPU.
        handle: Of the allocation, for ``cuIpcOpenMemHandle``; empty where the allocator made one that cannot be shared.
        offset: Of the first element in the allocation.
    """

    uuid: str
    handle: bytes
    offset: int


class Handle(NamedTuple):
    """One registration, as others know it."""

    owner: str
    pid: int
    table: tuple[int, int, bytes]
    """Descriptor, inode and token of the owner's table."""
    slot: int
    number: int
    token: bytes
    place: tuple[int, tuple[int, ...], tuple[int, ...], int]
    """The fields of its :class:`Layout`."""
    dtype: str
    is_writable: bool
    cuda: CudaMemory | None
    rdma: RdmaMemory | None
    endpoint: Endpoint

    @property
    def layout(self) -> Layout:
        """Where it lies in the owner's memory."""
        return Layout(*self.place)

    @property
    def name(self) -> str:
        """For errors."""
        device = "" if self.cuda is None else "CUDA "
        return f"RemoteBuffer of {self.owner} ({device}{self.dtype} {list(self.place[1])})"
