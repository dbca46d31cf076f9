"""Generator endpoints called on many ranks at once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from danaus import Actor, ActorError, current_rank, endpoint, this_host

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LIMIT_S = 10.0


class Uneven(Actor):
    @endpoint
    async def numbers(self, count: int) -> AsyncIterator[int]:
        for number in range(count + current_rank().rank):
            yield number

    @endpoint
    async def fail_on_the_last_rank(self) -> AsyncIterator[int]:
        yield 0
        if current_rank().rank == 1:
            raise ValueError("no second item")
        await asyncio.Event().wait()


def test_ranks_are_read_in_step_until_one_fails_although_another_is_busy() -> None:
    with this_host().spawn_procs({"rank": 2}, name="uneven") as procs:
        mesh = procs.spawn("uneven", Uneven)

        assert [list(items) for items in mesh.numbers.call(2)] == [[0, 0], [1, 1]]

        seen: list[list[int]] = []
        with pytest.raises(ActorError, match=r"rank 1.*no second item"):
            seen += (list(step) for step in mesh.fail_on_the_last_rank.options(timeout=LIMIT_S).call())
        # An error waits for nobody: it may overtake the other rank's first item.
        assert seen in ([], [[0, 0]])
        # The busy rank's generator was closed, so that it takes the next call.
        assert [list(step) for step in mesh.numbers.options(timeout=LIMIT_S).call(1)] == [[0, 0]]
