"""What a fault is: what happens, to which rank, at which moment. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from typing import Unpack


class FaultKind(StrEnum):
    """What a fault does to the process that it strikes."""

    KILL = "kill"
    """SIGKILL: the process ends without another word."""
    STOP = "stop"
    """SIGSTOP: it stands still, as if its machine had."""
    EXIT = "exit"
    """It exits with a code, without cleaning up."""
    RAISE = "raise"
    """An exception comes out of the endpoint, or of the point."""
    HANG = "hang"
    """The thread blocks; where it holds the interpreter's lock, so does all Python of the process."""
    SLOW = "slow"
    """The thread goes on after some seconds."""


class Where(TypedDict, total=False):
    """When and where a fault strikes; what every way of making a :class:`Fault` takes.

    rank: Rank in the mesh given to :func:`inject`; None (the default) means every rank, each counting for itself.
    endpoint: Name of the endpoint at which it strikes.
    point: Name given to :func:`point` in the code.
    step: Only at points that were given this step.
    nth: Which time, counted in each process from when the fault was injected; 1 is the next.
    when: ``"before"`` the endpoint's body runs (the default), or ``"after"`` it, before the reply leaves.
    incarnation: ``"current"`` (the default): only in the process that lives when the fault is injected. ``"every"``: in
        that and in each that follows it. A number: in that incarnation of the rank.

    Without endpoint, point and step any endpoint counts.
    """

    rank: int | None
    endpoint: str | None
    point: str | None
    step: int | None
    nth: int
    when: Literal["before", "after"]
    incarnation: int | Literal["current", "every"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault. Make it by the name of what happens: ``Fault.kill(rank=3, endpoint="step", nth=5)``.

    :class:`Where` explains rank, endpoint, point, step, nth, when and incarnation. It strikes once in a process.

    Attributes:
        kind: What happens.
        code: Exit code, of an exit.
        exception: What is raised.
        seconds: How long a stop, a hang or a delay lasts; None for as long as nobody ends it.
        holds_gil: Whether a hang holds the interpreter's lock.

    Raises:
        ValueError: The fields contradict each other.
    """

    kind: FaultKind
    rank: int | None = None
    endpoint: str | None = None
    point: str | None = None
    step: int | None = None
    nth: int = 1
    when: Literal["before", "after"] = "before"
    incarnation: int | Literal["current", "every"] = "current"
    code: int = 1
    exception: BaseException | None = field(default=None, compare=False)
    seconds: float | None = None
    holds_gil: bool = False

    def __post_init__(self) -> None:
        if self.nth < 1:
            self._refuse(f"nth={self.nth}", "the first time is 1")
        if self.rank is not None and self.rank < 0:
            self._refuse(f"rank={self.rank}", "ranks count from 0; None means every rank")
        if self.endpoint is not None and (self.point is not None or self.step is not None):
            self._refuse(
                f"endpoint={self.endpoint!r} with a point or step", "a step is that of a point; give one of both"
            )
        if self.when not in {"before", "after"}:
            self._refuse(f"when={self.when!r}", 'expected "before" or "after" the endpoint\'s body')
        if self.when == "after" and not self.is_at_endpoint:
            self._refuse('when="after"', "a point has no after; endpoints have")
        if self.incarnation not in {"current", "every"} and not (
            isinstance(self.incarnation, int) and self.incarnation >= 0
        ):
            self._refuse(f"incarnation={self.incarnation!r}", 'expected "current", "every" or a number from 0 on')
        if self.seconds is not None and not self.seconds > 0:
            self._refuse(f"{self.seconds!r} seconds", "expected more than zero, or None for no end")

    def _refuse(self, value: str, rule: str) -> None:
        raise ValueError(f"Fault.{self.kind}: {value}: {rule}")

    @classmethod
    def kill(cls, **where: Unpack[Where]) -> Fault:
        """SIGKILL."""
        return cls(kind=FaultKind.KILL, **where)

    @classmethod
    def stop(cls, *, for_s: float | None = None, **where: Unpack[Where]) -> Fault:
        """SIGSTOP; after ``for_s`` seconds the process that injected it lets it go on, else :func:`resume` does."""
        return cls(kind=FaultKind.STOP, seconds=for_s, **where)

    @classmethod
    def exit(cls, code: int = 1, **where: Unpack[Where]) -> Fault:
        """The process exits with ``code``, at once."""
        return cls(kind=FaultKind.EXIT, code=code, **where)

    @classmethod
    def raises(cls, exception: BaseException, **where: Unpack[Where]) -> Fault:
        """``exception``, which has to be picklable, is raised."""
        return cls(kind=FaultKind.RAISE, exception=exception, **where)

    @classmethod
    def hang(cls, *, for_s: float | None = None, holds_gil: bool = False, **where: Unpack[Where]) -> Fault:
        """The thread blocks until the fault is withdrawn or ``for_s`` has passed.

        With ``holds_gil`` nothing of the process's Python runs meanwhile, and withdrawing does not reach it either.
        """
        return cls(kind=FaultKind.HANG, seconds=for_s, holds_gil=holds_gil, **where)

    @classmethod
    def slow(cls, seconds: float, **where: Unpack[Where]) -> Fault:
        """It takes ``seconds`` longer; in an async endpoint others go on meanwhile."""
        return cls(kind=FaultKind.SLOW, seconds=seconds, **where)

    @property
    def is_at_endpoint(self) -> bool:
        """Whether endpoints count for it, rather than points."""
        return self.point is None and self.step is None

    def matches_endpoint(self, name: str, when: str) -> bool:
        """Whether a call of endpoint ``name`` counts."""
        return self.is_at_endpoint and self.endpoint in {None, name} and self.when == when

    def matches_point(self, name: str, step: int | None) -> bool:
        """Whether passing point ``name`` at ``step`` counts."""
        return not self.is_at_endpoint and self.point in {None, name} and self.step in {None, step}

    def as_fields(self) -> dict[str, Any]:
        """Everything but the exception, as plain data."""
        return {
            "kind": self.kind.value,
            "rank": self.rank,
            "endpoint": self.endpoint,
            "point": self.point,
            "step": self.step,
            "nth": self.nth,
            "when": self.when,
            "incarnation": self.incarnation,
            "code": self.code,
            "seconds": self.seconds,
            "holds_gil": self.holds_gil,
        }

    @staticmethod
    def from_fields(fields: dict[str, Any]) -> Fault:
        """Rebuild what :meth:`as_fields` returned."""
        values = {**fields}
        return Fault(kind=FaultKind(values.pop("kind")), **values)

    def __str__(self) -> str:
        return f"{self._what()} {'every rank' if self.rank is None else f'rank {self.rank}'} {self._moment()}"

    def _what(self) -> str:
        detail = ""
        if self.kind is FaultKind.EXIT:
            detail = f"({self.code})"
        elif self.kind is FaultKind.RAISE:
            detail = f"({type(self.exception).__name__})"
        elif self.seconds is not None or self.holds_gil:
            parts = [f"{self.seconds:g} s"] if self.seconds is not None else []
            detail = f"({', '.join([*parts, *['holding the GIL'] * self.holds_gil])})"
        return f"{self.kind}{detail}"

    def _moment(self) -> str:
        if self.is_at_endpoint:
            where = f"{self.when} call {self.nth} of {'any endpoint' if self.endpoint is None else repr(self.endpoint)}"
        else:
            at = "any point" if self.point is None else f"point {self.point!r}"
            where = f"at {at}" + ("" if self.step is None else f" of step {self.step}") + f", time {self.nth}"
        return where + ("" if self.incarnation == "current" else f", incarnation {self.incarnation}")
