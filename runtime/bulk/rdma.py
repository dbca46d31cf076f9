"""Transfers between hosts by NVIDIA's NIXL, which moves bytes by RDMA where the network has it.

Used where ``nixl`` is installed and DANAUS_NIXL switches it on in both processes: what it sends is not encrypted, and
its listeners know no certificate. Whether a buffer is still registered is asked of its owner, over TLS, before each
transfer; bytes under way when it is dropped are refused by network cards, and not by NIXL's emulation over tcp. Memory
with gaps, and whatever NIXL refuses, goes by TLS.
"""

from __future__ import annotations

import secrets
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..errors import DanausError
from .near import Unreachable
from .progress import CalledOff

if TYPE_CHECKING:
    from .memory import Memory
    from .progress import Progress

PART_BYTES: Final = 256 << 20
"""Between parts of this size a transfer counts as moved."""

_FIRST_PAUSE_S: Final = 0.00005
_LAST_PAUSE_S: Final = 0.002
_CHECK_S: Final = 0.2


class RdmaMemory(NamedTuple):
    """What others need to reach memory that is registered with NIXL.

    Attributes:
        metadata: Of the owner's agent and this memory.
        kind: ``"DRAM"`` or ``"VRAM"``.
        device: Number of the GPU, or 0.
    """

    metadata: bytes
    kind: str
    device: int


class Rdma:
    """This process's NIXL agent. Every method may be called from any thread.

    Raises:
        ImportError: NIXL is not installed, or cannot be used here.
    """

    def __init__(self, name: str) -> None:
        from nixl._api import nixl_agent, nixl_agent_config  # pyright: ignore[reportMissingImports]

        # Its methods are not to be called by two threads at once.
        self._lock = threading.Lock()
        self._agent: Any = nixl_agent(f"{name} {secrets.token_hex(8)}", nixl_agent_config(backends=["UCX"]))
        self._peers: dict[bytes, Any] = {}
        self._stuck: list[Any] = []

    def register(self, memory: Memory) -> tuple[Any, RdmaMemory] | None:
        """Register memory; return what to :meth:`deregister`, and what others need. None where NIXL cannot have it."""
        if not memory.layout.is_contiguous or not memory.size_bytes:
            return None
        kind, device = _kind(memory)
        try:
            with self._lock:
                registered = self._agent.register_memory(
                    [(memory.layout.address, memory.size_bytes, device, "")], mem_type=kind
                )
                metadata = self._agent.get_partial_agent_metadata(registered, inc_conn_info=True)
        except Exception:  # noqa: BLE001  its errors have no common class
            return None
        return registered, RdmaMemory(metadata, kind, device)

    def deregister(self, registered: Any) -> None:
        """Let go of memory."""
        with self._lock:
            self._agent.deregister_memory(registered)

    def transfer(self, theirs: RdmaMemory, address: int, memory: Memory, progress: Progress, *, is_read: bool) -> None:
        """Copy between the owner's memory from ``address`` on and ``memory``.

        Raises:
            Unreachable: NIXL cannot do it; the bytes moved by then do not count.
            DanausError: The owner died, or the time is over.
            CalledOff: Nobody wants it any more.
        """
        registered = self.register(memory)
        if registered is None:
            raise Unreachable("memory that NIXL cannot have")
        op, done_bytes = "READ" if is_read else "WRITE", progress.done_bytes
        try:
            with self._lock:
                peer = self._peer(theirs.metadata)
            while progress.left_bytes:
                size_bytes, done = min(progress.left_bytes, PART_BYTES), progress.done_bytes
                ours = (memory.layout.address + done, size_bytes, registered[1].device)
                other = (address + done, size_bytes, theirs.device)
                with self._lock:
                    request = self._agent.initialize_xfer(
                        op,
                        self._agent.get_xfer_descs([ours], mem_type=registered[1].kind),
                        self._agent.get_xfer_descs([other], mem_type=theirs.kind),
                        peer,
                    )
                    state = self._agent.transfer(request)
                self._wait(request, state, memory, progress)
                progress.on_moved(size_bytes)
        except Unreachable:
            progress.done_bytes = done_bytes
            raise
        finally:
            if not any(memory is kept for _, kept in self._stuck):
                self.deregister(registered[0])

    def _peer(self, metadata: bytes) -> Any:
        if metadata not in self._peers:
            try:
                self._peers[metadata] = self._agent.add_remote_agent(metadata)
            except Exception as error:
                raise Unreachable(f"NIXL does not know the owner: {error}") from error
        return self._peers[metadata]

    def _wait(self, request: Any, state: str, memory: Memory, progress: Progress) -> None:
        """Wait for one part, and release it; memory that NIXL does not let go of is kept for ever."""
        pause_s, checked_s, failed = _FIRST_PAUSE_S, time.monotonic(), ""
        try:
            while state == "PROC":
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LAST_PAUSE_S)
                with self._lock:
                    state = self._agent.check_xfer_state(request)
                progress.check()
                if time.monotonic() > checked_s + _CHECK_S:
                    checked_s = time.monotonic()
                    progress.check_owner()
            if state != "DONE":
                failed = state
        except CalledOff:
            raise
        except Exception as error:
            progress.check_owner()
            if isinstance(error, DanausError):
                raise
            raise Unreachable(f"NIXL failed: {error}") from error
        finally:
            try:
                with self._lock:
                    self._agent.release_xfer_handle(request)
            except Exception:  # noqa: BLE001  its errors have no common class
                self._stuck.append((request, memory))
        if failed:
            raise Unreachable(f"NIXL says {failed}")


def _kind(memory: Memory) -> tuple[str, int]:
    return ("DRAM", 0) if memory.device is None else ("VRAM", memory.device)
