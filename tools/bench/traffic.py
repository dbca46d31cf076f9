"""What became of numbered messages: how many were lost, came twice, or overtook others. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the messages to one receiver, or to several."""

    sent: int = 0
    lost: int = 0
    doubled: int = 0
    overtaken: int = 0
    """Came after one of the same sender that was sent later."""

    @classmethod
    def of(cls, sent: Mapping[int, int], came: Mapping[int, Sequence[int]]) -> Self:
        """Compare what each sender has sent, numbered from 0, with what came of it, in the order in which it came.

        Raises:
            ValueError: Something came that nobody has sent.
        """
        lost = doubled = overtaken = 0
        for sender, numbers in came.items():
            strange = [number for number in numbers if not 0 <= number < sent.get(sender, 0)]
            if strange:
                raise ValueError(f"messages {strange[:5]} came of sender {sender}, which sent {sent.get(sender, 0)}")
        for sender, count in sent.items():
            numbers = came.get(sender, ())
            lost += count - len(set(numbers))
            doubled += len(numbers) - len(set(numbers))
            overtaken += _overtaken(numbers)
        return cls(sum(sent.values()), lost, doubled, overtaken)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.sent + other.sent,
            self.lost + other.lost,
            self.doubled + other.doubled,
            self.overtaken + other.overtaken,
        )

    @property
    def wrong(self) -> int:
        """All that should not be."""
        return self.lost + self.doubled + self.overtaken


def _overtaken(numbers: Sequence[int]) -> int:
    seen: set[int] = set()
    last, count = -1, 0
    for number in numbers:
        # A second copy is counted as such alone.
        count += number < last and number not in seen
        last = max(last, number)
        seen.add(number)
    return count
