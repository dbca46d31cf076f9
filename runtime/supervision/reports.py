"""Decides when to print what about failures: one block per root cause, with what followed from it beneath.

Pure logic: no clock, no printing. Failures and notes on them come in, texts to print come out. A block waits a moment
for what follows from its root; what comes after it was printed is a line of its own that names the root. Nothing comes
out twice, and what waits at the end comes out of :meth:`RootCauses.flush`.

    mesh 'trainers' rank 3 (pp=1, dp=1, host n7, pid 412) was killed by SIGKILL
      its last lines:
        | step 121: loss 2.29
      what followed: mesh 'metrics' rank 3 was killed by SIGKILL
      what was done: started again as incarnation 1 after 84 ms
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from ..failure import FailureKind
from .report_text import Repair, block_text, late_texts, mesh_size, names

if TYPE_CHECKING:
    from ..failure import MeshFailure

WAIT_S: Final = 0.2
"""How long a block waits for what follows, and a later line for others like it."""

ALIKE_S: Final = 60.0
"""How long after a failure an equal one of another rank is told in one line."""

_MAX_KNOWN: Final = 10_000
_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]+")

_Key = tuple[object, ...]


@dataclass(slots=True, eq=False)
class _Block:
    """One root cause: what it is called, and what of it waits to be printed."""

    likeness: _Key
    name: str
    is_printed: bool = False
    due_s: float | None = None
    heard_s: dict[tuple[_Key, str], float] = field(default_factory=dict)
    """When each failure, and each (failure, note), was first heard of."""
    roots: list[MeshFailure] = field(default_factory=list)
    followers: list[tuple[int, MeshFailure]] = field(default_factory=list)
    """(number of causes between it and the root, failure)."""
    notes: list[tuple[MeshFailure, str]] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)

    def is_news(self, failure: MeshFailure, text: str, now_s: float) -> bool:
        """Whether this is heard for the first time; it is not, the next time."""
        news = (_key(failure), text)
        if news in self.heard_s:
            return False
        self.heard_s[news] = now_s
        return True


class RootCauses:
    """Every failure that this process reports. The first line of a text names the root, those beneath are indented."""

    def __init__(self) -> None:
        # Whatever was ever heard of, roots and followers alike, oldest first.
        self._blocks: dict[_Key, _Block] = {}
        # The latest of each likeness.
        self._alike: dict[_Key, _Block] = {}
        self._waiting: list[_Block] = []

    def on_failure(self, failure: MeshFailure, now_s: float) -> list[str]:
        """A rank is lost or stuck. What was heard before is ignored, and so is what its owner stopped."""
        if failure.kind is not FailureKind.STOPPED:
            self._block_of(failure, now_s)
        return self.check(now_s)

    def on_repair(self, failure: MeshFailure, incarnation: int, now_s: float) -> list[str]:
        """The rank that ``failure`` took is up again, as ``incarnation``."""
        block = self._block_of(failure, now_s)
        if block.is_news(failure, f"incarnation {incarnation}", now_s):
            after_s = now_s - block.heard_s.get((_key(failure), ""), now_s)
            block.repairs.append(Repair(_slim(failure), incarnation, after_s))
            self._let_wait(block, now_s)
        return self.check(now_s)

    def on_note(self, failure: MeshFailure, text: str, now_s: float) -> list[str]:
        """Something else became of ``failure``: ``its owner has handled it``, ``it answers again``."""
        block = self._block_of(failure, now_s)
        if block.is_news(failure, text, now_s):
            block.notes.append((_slim(failure), text))
            self._let_wait(block, now_s)
        return self.check(now_s)

    def check(self, now_s: float) -> list[str]:
        """Return what has waited long enough, oldest first; call it at :meth:`next_check_s`."""
        texts: list[str] = []
        for block in [block for block in self._waiting if block.due_s is not None and block.due_s <= now_s]:
            # Not if another one has taken it in meanwhile.
            if block in self._waiting:
                self._take_in_whole_mesh(block)
                texts += self._print(block)
        return texts

    def next_check_s(self) -> float | None:
        """When the next text is due; None while none waits."""
        return min((block.due_s for block in self._waiting if block.due_s is not None), default=None)

    def flush(self) -> list[str]:
        """Return everything that waits."""
        return self.check(math.inf)

    def _block_of(self, failure: MeshFailure, now_s: float) -> _Block:
        """The block that the failure is told in: that of its root, which what is new of its chain joins."""
        *followers, root = failure.chain()
        block = self._blocks.get(_key(root))
        if block is None:
            block = self._new_root(root, now_s)
        elif not block.is_printed:
            block.roots = [_richer(known, root) for known in block.roots]
        for depth, follower in enumerate(reversed(followers)):
            self._add_follower(block, depth, follower, now_s)
        # Another one, where a cause is told that differs from the one told before.
        return self._blocks[_key(failure)]

    def _new_root(self, root: MeshFailure, now_s: float) -> _Block:
        likeness = _likeness(root)
        block = self._alike.get(likeness)
        is_like_it = block is not None and _reason(root) and now_s - min(block.heard_s.values()) <= ALIKE_S
        if block is None or not is_like_it:
            block = self._alike[likeness] = _Block(likeness, names([root]))
        self._blocks[_key(root)] = block
        block.is_news(root, "", now_s)
        block.roots.append(root)
        self._let_wait(block, now_s)
        self._forget_oldest()
        return block

    def _add_follower(self, block: _Block, depth: int, follower: MeshFailure, now_s: float) -> None:
        known = self._blocks.setdefault(_key(follower), block)
        if known is not block and not known.is_printed and all(_key(root) == _key(follower) for root in known.roots):
            # It was taken for a root until its cause was told.
            known.followers = [(0, root) for root in known.roots] + [(1 + deep, each) for deep, each in known.followers]
            self._take_in(block, known)
            self._let_wait(block, now_s)
        elif known is block and block.is_news(follower, "", now_s):
            block.followers.append((depth, _slim(follower)))
            self._let_wait(block, now_s)

    def _take_in_whole_mesh(self, block: _Block) -> None:
        """Make one of the blocks that say alike, without giving a reason, of every rank of a mesh."""
        alike = [each for each in self._waiting if each.likeness == block.likeness and not each.is_printed]
        ranks = {root.rank for each in alike for root in each.roots}
        if block.is_printed or not block.roots[0].dims or ranks != set(range(mesh_size(block.roots[0]))):
            return
        for other in alike:
            if other is not block:
                block.roots += other.roots
                self._take_in(block, other)

    def _take_in(self, block: _Block, other: _Block) -> None:
        block.followers += other.followers
        block.notes += other.notes
        block.repairs += other.repairs
        block.heard_s |= other.heard_s
        self._blocks |= {key: block for key, _ in other.heard_s}
        self._waiting.remove(other)
        if self._alike.get(other.likeness) is other:
            del self._alike[other.likeness]

    def _let_wait(self, block: _Block, now_s: float) -> None:
        if block.due_s is None:
            block.due_s = now_s + WAIT_S
            self._waiting.append(block)

    def _print(self, block: _Block) -> list[str]:
        if block.is_printed:
            texts = late_texts(block.name, block.roots, block.followers, block.notes, block.repairs)
        else:
            texts = [block_text(block.roots, block.followers, block.notes, block.repairs)]
            block.name = names(block.roots)
        self._waiting.remove(block)
        block.is_printed, block.due_s = True, None
        block.roots, block.followers, block.notes, block.repairs = [], [], [], []
        return texts

    def _forget_oldest(self) -> None:
        while len(self._blocks) > _MAX_KNOWN:
            block = self._blocks.pop(next(iter(self._blocks)))
            if self._alike.get(block.likeness) is block:
                del self._alike[block.likeness]


def _key(failure: MeshFailure) -> _Key:
    # A process dies once and may be stuck many times.
    seen_s = None if failure.kind.is_death else failure.at_s
    return failure.kind, failure.mesh, failure.rank, failure.incarnation, failure.host, failure.pid, seen_s


def _reason(failure: MeshFailure) -> str:
    """What two failures have in common if one thing caused both; empty where they say nothing of why."""
    return _ADDRESS.sub("0x", failure.traceback or failure.detail)


def _likeness(failure: MeshFailure) -> _Key:
    # A number, for it is kept long after the text has been printed.
    return failure.kind, failure.mesh, failure.exit_code, failure.signum, hash(_reason(failure))


def _slim(failure: MeshFailure) -> MeshFailure:
    """Without what is printed of roots alone."""
    return replace(failure, log_tail=(), cause=None)


def _richer(known: MeshFailure, again: MeshFailure) -> MeshFailure:
    """The one of two records of one failure that tells more."""
    tells_more = len(again.log_tail) > len(known.log_tail) or (again.traceback and not known.traceback)
    return again if tells_more and _key(known) == _key(again) else known
