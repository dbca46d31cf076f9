"""Meshes that lose ranks and get them back: what is whole, and filling holes by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..address import incarnation_of, place_of
from ..calls.replies import gone_error
from ..context import local_proc
from ..failure import FailureKind
from .health import largest_box
from .restart import RankState

if TYPE_CHECKING:
    from ..calls.future import Future
    from ..failure import MeshFailure
    from ..proc import LocalProc

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Health(Generic[M]):
    """Which ranks of a mesh live, as this process has heard.

    Attributes:
        mesh: The largest slice without a hole: a range of indices in every dimension. None where nothing is left.
        ranks: Every rank that lives, as ranks of the mesh that was asked.
        lost: What became of the others, where it is known.
    """

    mesh: M | None
    ranks: tuple[int, ...]
    lost: dict[int, MeshFailure | None] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether no rank is lost."""
        return not self.lost


class Filling:
    """Ranks that are started again by hand, and who waits for them; all of it on the I/O thread.

    A sink: it hears of every process that is gone, so it ends whatever becomes of the ranks.
    """

    def __init__(self, local: LocalProc, mesh_id: str, ranks: list[int], done: Future[None], *, force: bool) -> None:
        self._local, self._mesh_id, self._force, self._done = local, mesh_id, force, done
        self._ranks = ranks
        self._waiting: dict[str, int] = {}
        """By place: the incarnation that is to be replaced."""

    def start(self) -> None:
        """Have the supervisor start them."""
        owned = self._local.supervisor.procs.get(self._mesh_id)
        if owned is None:
            self._done._reject(RuntimeError(f"{self._done.describe()}: it was stopped meanwhile; spawn a new one"))
            return
        self._waiting = dict(map(self._replaced, self._ranks))
        self._port, self._fillings = self._local.next_port(), owned.fillings
        self._local.ports[self._port] = self
        self._fillings.append(self)
        try:
            self._local.supervisor.fill(self._mesh_id, self._ranks, force=self._force)
        except ValueError as error:
            self._done._reject(error)
        self._end()

    def _replaced(self, rank: int) -> tuple[str, int]:
        place = f"{self._mesh_id}.{rank}"
        proc = self._local.resolve(place)
        is_announced = proc not in self._local.gone and not is_up(self._local, self._mesh_id, rank)
        return place, incarnation_of(proc) - is_announced

    def on_up(self, proc: str) -> None:
        """A process takes messages."""
        before = self._waiting.get(place_of(proc))
        if before is not None and incarnation_of(proc) > before:
            del self._waiting[place_of(proc)]
        self._end()

    def on_reply(self, *_reply: object) -> bool:
        """Nobody replies."""
        return False

    def on_gone(self, proc: str, failure: MeshFailure) -> bool:
        """Fail, where what was to replace a rank is lost for good."""
        before = self._waiting.get(place_of(proc))
        if before is not None and incarnation_of(proc) > before and not failure.restarts:
            self._done._reject(gone_error(failure, self._done.describe()))
        self._end()
        return self._done.done()

    def _end(self) -> None:
        if not self._waiting:
            self._done._resolve(lambda: None)
        if self._done.done() and self in self._fillings:
            self._fillings.remove(self)
            self._local.ports.pop(self._port, None)


def check_health(mesh: Any, mesh_id: str) -> Health[Any]:
    """Return the health of a mesh whose processes are those of ``mesh_id``."""
    local = local_proc()
    region = mesh._region
    alive: list[int] = []
    lost: dict[int, MeshFailure | None] = {}
    for index, rank in enumerate(region.ranks()):
        if is_up(local, mesh_id, rank):
            alive.append(index)
        else:
            lost[index] = failure_of(local, mesh_id, rank)
    if not alive:
        return Health(None, (), lost)
    sizes = tuple(region.sizes)
    box = largest_box(sizes, lost)
    assert box is not None
    ranges = {label: slice(start, stop) for label, (start, stop) in zip(region.labels, box, strict=True)}
    return Health(mesh.slice(**ranges) if ranges else mesh, tuple(alive), lost)


def is_up(local: LocalProc, mesh_id: str, rank: int) -> bool:
    """Whether a rank's process lives and is not being started again."""
    owned = local.supervisor.procs.get(mesh_id)
    if owned is not None and (rank in owned.lost or owned.tracker.state(rank) is not RankState.UP):
        return False
    proc = local.resolve(f"{mesh_id}.{rank}")
    link = local.links.get(proc)
    is_starting = incarnation_of(proc) > 0 and link is not None and not link.is_open
    return proc not in local.gone and not is_starting


def failure_of(local: LocalProc, mesh_id: str, rank: int) -> MeshFailure | None:
    """How a rank was lost, if this process has heard."""
    owned = local.supervisor.procs.get(mesh_id)
    if owned is not None and rank in owned.lost:
        return owned.lost[rank]
    return local.gone.get(local.resolve(f"{mesh_id}.{rank}"))


def holes_of(local: LocalProc, mesh_id: str, ranks: tuple[int, ...]) -> list[int]:
    """Ranks that are lost for good, unless somebody replaces them; not those that were stopped."""
    gone = {rank: local.gone.get(local.resolve(f"{mesh_id}.{rank}")) for rank in ranks}
    return [rank for rank, failure in gone.items() if failure is not None and failure.kind is not FailureKind.STOPPED]
