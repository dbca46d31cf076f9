"""The messages of a chaos round: how each kind is sent, and what its outcome is compared with."""

# Futures, streams and errors of every kind pass through here.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import zlib
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from danaus import CallCancelledError, CallTimeoutError, SupervisionError, testing
from danaus.runtime.address import incarnation_of
from danaus.runtime.invoke import ITEM_WINDOW

from .model import ROOT, MeshModel, Rule, rank_of_life
from .subject import Subject

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable

    from danaus import ProcMesh

WEIGHTS: Final = {
    "add": 30,
    "tell": 16,
    "tell_all": 8,
    "call": 8,
    "outcomes": 8,
    "arrivals": 6,
    "items": 6,
    "total": 8,
    "rest": 5,
    "relay": 6,
    "state": 5,
    "retry": 4,
    "choose": 4,
    "cancel": 3,
    "hurry": 3,
    "spawn": 1,
    "nest": 1,
    "kill": 2,
}
"""Kinds of messages, and how often each is sent."""

MANY: Final = 1000
MARGIN_S: Final = 1.0
"""How much later than its limit a call may be seen to be late."""


@dataclass(slots=True)
class Waiting:
    """A message whose outcome is not known yet."""

    number: int
    kind: str
    sent_to: set[tuple[int, int]]
    """Ranks, and the incarnation of each at the time."""
    collect: Callable[[], None]
    may_give_up: bool = False


class Messages:
    """Messages to one mesh of subjects. What becomes of errors is said by whoever derives from it."""

    procs: ProcMesh
    subjects: Any

    def __init__(self, chance: random.Random, model: MeshModel, *, limit_s: float) -> None:
        self.chance, self.model, self.limit_s = chance, model, limit_s
        self.num_ranks = len(model.ranks)
        self.is_bounded = False
        self.waiting: deque[Waiting] = deque()
        self.checked: Counter[str] = Counter()
        self.killed: set[tuple[int, int]] = set()
        self.pids: set[int] = set()
        self.last = 0

    def explain(self, kind: str, number: int, error: Exception) -> None:
        """Take an error that a message came to."""
        raise NotImplementedError

    def on_late(self, kind: str, number: int, sent_to: set[tuple[int, int]], error: Exception) -> None:
        """A message's outcome is not there within the limit."""
        raise NotImplementedError

    def violate(self, rule: Rule, text: str) -> None:
        """Something was not as it had to be."""
        raise NotImplementedError

    def send(self, kind: str) -> None:
        """Send the next message, one of ``kind``."""
        self.last += 1
        try:
            getattr(self, f"send_{kind}")(self.last)
        except SupervisionError as error:
            self.explain(kind, self.last, error)
        except CallTimeoutError as error:
            self.on_late(kind, self.last, self.now(range(self.num_ranks)), error)

    def one(self) -> tuple[int, Any]:
        """A random rank, and the mesh of that alone."""
        rank = self.chance.randrange(self.num_ranks)
        return rank, self.subjects.slice(rank=rank)

    def limited(self, endpoint: Any, **options: Any) -> Any:
        """``endpoint`` with the limit of every call. Some have none of their own, where no mailbox can be full."""
        if not options and not self.is_bounded and not endpoint._spec.is_stream and self.chance.random() < 0.5:
            return endpoint
        return endpoint.options(timeout=self.limit_s, **options)

    def result(self, future: Any) -> Any:
        """What a call came to, within the limit."""
        return future.get(timeout=self.limit_s + MARGIN_S)

    def error(self, future: Any) -> Exception | None:
        """The error that a call came to, or None, within the limit."""
        return future.exception(timeout=self.limit_s + MARGIN_S)

    def put(self, kind: str, ranks: list[int], collect: Callable[[], None], *, may_give_up: bool = False) -> None:
        """Note that the outcome of the last message is to be collected."""
        self.waiting.append(Waiting(self.last, kind, self.now(ranks), collect, may_give_up))

    def now(self, ranks: Iterable[int]) -> set[tuple[int, int]]:
        """The ranks with the incarnation that this process believes to be there."""
        places = self.procs._proc_ids()
        return {(rank, incarnation_of(places[rank])) for rank in ranks}

    def send_add(self, number: int, kind: str = "add", *arguments: Any) -> None:
        rank, one = self.one()
        self.model.on_send(number, [rank])
        future = self.limited(getattr(one, kind)).call_one(ROOT, number, *arguments)
        self.put(kind, [rank], lambda: self.take(rank, number, self.result(future)))

    def send_rest(self, number: int) -> None:
        self.send_add(number, "rest")

    def send_total(self, number: int) -> None:
        rank, one = self.one()
        values = self.chance.randbytes(self.chance.choice((10, 50_000, 300_000)))
        self.model.on_send(number, [rank])
        future = self.limited(one.total).call_one(ROOT, number, values)

        def collect() -> None:
            life, place, checksum, half = self.result(future)
            self.take(rank, number, (life, place))
            self.expect(number, (checksum, half), (zlib.crc32(values), values[::2]))

        self.put("total", [rank], collect)

    def send_tell(self, number: int) -> None:
        rank, one = self.one()
        self.tell(number, [rank], one)

    def send_tell_all(self, number: int) -> None:
        self.tell(number, list(range(self.num_ranks)), self.subjects)

    def tell(self, number: int, ranks: list[int], mesh: Any) -> None:
        self.model.on_send(number, ranks, is_open=True)
        try:
            self.limited(mesh.tell).broadcast(ROOT, number)
        except Exception:
            self.model.on_doubt(number, ranks)
            raise
        self.checked["tell"] += 1

    def send_call(self, number: int) -> None:
        ranks = list(range(self.num_ranks))
        self.model.on_send(number, ranks)
        future = self.limited(self.subjects.add).call(ROOT, number)

        def collect() -> None:
            for rank, answer in enumerate(self.result(future)):
                self.take(rank, number, answer)

        self.put("call", ranks, collect)

    def send_outcomes(self, number: int) -> None:
        ranks = list(range(self.num_ranks))
        self.model.on_send(number, ranks)
        future = self.limited(self.subjects.add, on_error="all").call(ROOT, number)

        def collect() -> None:
            for rank, answer in enumerate(self.result(future)):
                if isinstance(answer, Exception):
                    self.explain("outcomes", number, answer)
                else:
                    self.take(rank, number, answer)

        self.put("outcomes", ranks, collect)

    def send_arrivals(self, number: int) -> None:
        ranks = list(range(self.num_ranks))
        self.model.on_send(number, ranks)
        futures = list(self.limited(self.subjects.add).stream(ROOT, number))

        def collect() -> None:
            for future in futures:
                error = self.error(future)
                if error is not None:
                    self.explain("arrivals", number, error)
                else:
                    self.take(rank_of_life(future.get()[0]), number, future.get())

        self.put("arrivals", ranks, collect)

    def send_items(self, number: int) -> None:
        rank, one = self.one()
        count = self.chance.choice((0, 3, 50, 200))
        closes_at = self.chance.choice((None, None, 1))
        self.model.on_send(number, [rank])
        stream = self.limited(one.items).call_one(ROOT, number, count)

        def collect() -> None:
            life, index = "", -1
            for index, (life, value) in enumerate(stream):  # noqa: B007  the last one counts
                self.expect(number, value, index)
                if closes_at is not None and index >= closes_at:
                    stream.close()
                    return
            self.expect(number, index + 1, count)
            if life:
                self.take(rank, number, (life, None))

        self.put("items", [rank], collect)
        if count > ITEM_WINDOW:
            # Until somebody takes its items, it keeps the actor.
            self.collect(len(self.waiting) - 1)

    def send_relay(self, number: int) -> None:
        # To higher ranks only: they never wait for each other in a circle.
        rank = self.chance.randrange(self.num_ranks - 1)
        target = self.chance.randrange(rank + 1, self.num_ranks)
        self.model.on_send(number, [rank])
        future = self.limited(self.subjects.slice(rank=rank).relay).call_one(
            ROOT, number, self.subjects.slice(rank=target)
        )

        def collect() -> None:
            life, place, other, other_place = self.result(future)
            self.take(rank, number, (life, place))
            self.expect(number, rank_of_life(other), target)
            self.model.on_relayed(number, life, other, other_place)

        self.put("relay", [rank], collect)

    def send_state(self, number: int) -> None:
        rank, one = self.one()
        self.ask_state(number, rank, one)

    def ask_state(self, number: int, rank: int, one: Any) -> None:
        """Ask a rank for its log, which the model compares in the end."""
        self.model.on_send(number, [rank])
        future = self.limited(one.state).call_one(ROOT, number)

        def collect() -> None:
            life, place, pid, entries = self.result(future)
            self.take(rank, number, (life, place))
            self.pids.add(pid)
            self.model.on_log(number, life, entries)

        self.put("state", [rank], collect)

    def send_cancel(self, number: int) -> None:
        rank, one = self.one()
        self.model.on_send(number, [rank])
        future = self.limited(one.add).call_one(ROOT, number)
        future.cancel()
        self.put(
            "cancel",
            [rank],
            lambda: self.take(rank, number, self.result(future)),
            may_give_up=True,
        )

    def send_hurry(self, number: int) -> None:
        rank, one = self.one()
        self.model.on_send(number, [rank])
        try:
            future = one.rest.options(timeout=0.002).call_one(ROOT, number)
        except CallTimeoutError:
            return
        self.put(
            "hurry",
            [rank],
            lambda: self.take(rank, number, self.result(future)),
            may_give_up=True,
        )

    def send_spawn(self, number: int) -> None:
        """Further actors on the same processes, with a life of their own that no model looks at."""
        more: Any = self.procs.spawn("more", Subject)
        future = self.limited(more.add).call(ROOT, number)

        def collect() -> None:
            answers = list(self.result(future))
            self.expect(number, [place for _, place in answers], [1] * self.num_ranks)
            self.error(more.stop(timeout=self.limit_s))

        self.put("spawn", list(range(self.num_ranks)), collect)

    def send_nest(self, number: int) -> None:
        rank, one = self.one()
        self.model.on_send(number, [rank])
        future = self.limited(one.nest).call_one(ROOT, number)

        def collect() -> None:
            life, place, pid = self.result(future)
            self.take(rank, number, (life, place))
            self.pids.add(pid)

        self.put("nest", [rank], collect)

    def send_retry(self, number: int) -> None:
        """An idempotent call, sent again as often as its rank is lost: it has to come through."""
        rank, one = self.one()
        future = self.limited(one.look, retries=MANY).call_one()
        self.put("retry", [rank], lambda: self.expect(number, rank_of_life(self.result(future)), rank))

    def send_choose(self, number: int) -> None:
        future = self.limited(self.subjects.look).choose()
        ranks = range(self.num_ranks)
        self.put("choose", [*ranks], lambda: self.expect(number, rank_of_life(self.result(future)) in ranks, True))

    def send_kill(self, _number: int) -> None:
        rank = self.chance.randrange(self.num_ranks)
        self.killed.add((rank, testing.kill(self.subjects, rank, timeout=self.limit_s)))

    def collect(self, index: int) -> None:
        """Wait for the outcome of a message, and compare it."""
        waiting = self.waiting[index]
        del self.waiting[index]
        self.checked[waiting.kind] += 1
        try:
            waiting.collect()
        except (CallTimeoutError, CallCancelledError) as error:
            if not waiting.may_give_up:
                self.on_late(waiting.kind, waiting.number, waiting.sent_to, error)
        except TimeoutError as error:
            self.on_late(waiting.kind, waiting.number, waiting.sent_to, error)
        except Exception as error:  # noqa: BLE001  each has to be explained
            self.explain(waiting.kind, waiting.number, error)

    def take(self, rank: int, number: int, answer: tuple[str, int | None]) -> None:
        """Tell the model of an answer."""
        life, place = answer
        if rank_of_life(life) != rank:
            self.violate(Rule.WRONG, f"message {number} to rank {rank} was answered by {life}")
        else:
            self.model.on_answer(number, life, place)

    def expect(self, number: int, value: object, expected: object) -> None:
        """Compare what a message brought with what it had to."""
        if value != expected:
            self.violate(Rule.WRONG, f"message {number}: got {value!r:.200}, expected {expected!r:.200}")
