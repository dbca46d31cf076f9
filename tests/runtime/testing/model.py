"""What must hold of messages while faults strike: a model of one actor mesh, fed with what was sent and what came back.

Pure. Each actor keeps a log of the messages that it has handled, and says its *life*: a name that is new each time it
is constructed. The model compares logs and answers with the order of sending, once everything has come back. It does
not know when an actor died: a message sent around a death may or may not be in a log, but between two answers of one
life everything else must be, once, in order.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

ROOT = "root"
"""The sender whose order is compared message by message."""


class Rule(StrEnum):
    """What was broken."""

    NO_ANSWER = "no answer"
    DEATH_MISSED = "death missed"
    LOST = "lost"
    TWICE = "delivered twice"
    ORDER = "out of order"
    WRONG = "wrong value"
    UNEXPLAINED = "unexplained error"
    NO_RETURN = "did not come back"
    LEFT_BEHIND = "left behind"


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that must not be."""

    rule: Rule
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.text}"


@dataclass(frozen=True, slots=True)
class Log:
    """What an actor had handled when it answered message ``number``: (sender, number) of each."""

    number: int
    life: str
    entries: tuple[tuple[str, int], ...]


@dataclass(slots=True)
class RankModel:
    """What was sent to one rank, and what it said."""

    sent: list[int] = field(default_factory=list)
    open: set[int] = field(default_factory=set)
    """Sent without asking for an answer."""
    answers: dict[int, tuple[str, int | None]] = field(default_factory=dict)
    """Life, and place in its log where it told."""
    relayed: list[tuple[int, str, str, int, int]] = field(default_factory=list)
    """Number, relaying life, life here, place in its log, and what had been sent when its answer was there."""
    logs: list[Log] = field(default_factory=list)

    def check(self, name: str) -> list[Violation]:
        """Return everything that is wrong; call it once every message has its outcome."""
        found = self._check_lives(name)
        for log in self.logs:
            found += self._check_log(f"{name}, life {log.life}, log at {log.number}", log)
        return found

    def _check_lives(self, name: str) -> list[Violation]:
        """A life that has ended does not answer what was sent later, and places in a log grow."""
        found: list[Violation] = []
        past: set[str] = set()
        life, place, last = "", 0, 0
        for number in sorted(self.answers):
            new_life, new_place = self.answers[number]
            if new_life != life:
                past.add(life)
                life, place = new_life, 0
                if life in past:
                    found.append(Violation(Rule.ORDER, f"{name}: {number} was answered by {life}, which had ended"))
            if new_place is not None:
                if new_place <= place:
                    text = f"{name}: {number} is entry {new_place} of {life}'s log, {last} before it is {place}"
                    found.append(Violation(Rule.ORDER, text))
                place, last = new_place, number
        return found

    def _check_log(self, name: str, log: Log) -> list[Violation]:
        found: list[Violation] = []
        for entry, count in Counter(log.entries).items():
            if count > 1:
                found.append(Violation(Rule.TWICE, f"{name}: {entry} is there {count} times"))
        for sender in {sender for sender, _ in log.entries}:
            numbers = [number for other, number in log.entries if other == sender]
            # Repeated ones have been told above.
            if numbers != sorted(numbers) and len(numbers) == len(set(numbers)):
                found.append(Violation(Rule.ORDER, f"{name}: messages of {sender} came as {numbers}"))
        return found + self._check_own(name, log) + self._check_relayed(name, log)

    def _check_own(self, name: str, log: Log) -> list[Violation]:
        """Messages of the root: all between the life's first answer and the log have to be there, and no strangers."""
        found: list[Violation] = []
        there = {number for sender, number in log.entries if sender == ROOT}
        sent = set(self.sent)
        for number in sorted(there):
            life, place = self.answers.get(number, (log.life, None))
            if number not in sent:
                found.append(Violation(Rule.WRONG, f"{name}: {number} was never sent there"))
            elif life != log.life:
                found.append(Violation(Rule.TWICE, f"{name}: {number} is there, and was answered by {life} as well"))
            elif place is not None and log.entries[place - 1 : place] != ((ROOT, number),):
                found.append(Violation(Rule.WRONG, f"{name}: {number} was said to be entry {place}, and is not"))
        mine = [number for number, (life, _) in self.answers.items() if life == log.life]
        first = min([*mine, log.number])
        must = [n for n in self.sent if first <= n <= log.number and (n in self.open or n in mine)]
        found += [Violation(Rule.LOST, f"{name}: {number} is missing") for number in must if number not in there]
        return found

    def _check_relayed(self, name: str, log: Log) -> list[Violation]:
        found: list[Violation] = []
        for number, relay, life, place, sent_then in self.relayed:
            if life == log.life and sent_then < log.number and log.entries[place - 1 : place] != ((relay, number),):
                found.append(Violation(Rule.LOST, f"{name}: {number}, relayed by {relay}, is not entry {place}"))
        return found


class MeshModel:
    """The model of every rank of one actor mesh."""

    def __init__(self, name: str, num_ranks: int) -> None:
        self.name = name
        self.ranks = [RankModel() for _ in range(num_ranks)]
        self.last = 0

    def on_send(self, number: int, ranks: list[int], *, is_open: bool = False) -> None:
        """A message leaves for ``ranks``."""
        self.last = number
        for rank in ranks:
            self.ranks[rank].sent.append(number)
            if is_open:
                self.ranks[rank].open.add(number)

    def on_doubt(self, number: int, ranks: list[int]) -> None:
        """Whether an open message arrived cannot be known: its sending failed."""
        for rank in ranks:
            self.ranks[rank].open.discard(number)

    def on_answer(self, number: int, life: str, place: int | None = None) -> None:
        """An actor has handled a message."""
        self.ranks[rank_of_life(life)].answers[number] = life, place

    def on_relayed(self, number: int, relay: str, life: str, place: int) -> None:
        """An actor has handled what another sent it."""
        self.ranks[rank_of_life(life)].relayed.append((number, relay, life, place, self.last))

    def on_log(self, number: int, life: str, entries: list[tuple[str, int]]) -> None:
        """An actor has told its log."""
        log = Log(number, life, tuple((sender, other) for sender, other in entries))
        self.ranks[rank_of_life(life)].logs.append(log)

    def check(self) -> list[Violation]:
        """Return everything that is wrong."""
        return [found for rank, model in enumerate(self.ranks) for found in model.check(f"{self.name} rank {rank}")]


def rank_of_life(life: str) -> int:
    """The rank that begins the name of a life, as in ``2/9f3a``."""
    return int(life.partition("/")[0])
