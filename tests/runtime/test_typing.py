"""What an editor knows of a mesh: checked by the type checker in ``make check``, and run here."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_type

from danaus import Actor, Future, ValueMesh, concurrent_endpoint, endpoint, scatter, this_proc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from danaus.runtime.calls.item_stream import ItemStream


class Typed(Actor):
    def __init__(self, start: int) -> None:
        self.value = start

    @endpoint
    def add(self, amount: int) -> int:
        self.value += amount
        return self.value

    @endpoint
    async def title(self) -> str:
        return "typed"

    @concurrent_endpoint
    async def half(self, value: float) -> float:
        return value / 2

    @endpoint
    def count(self, n: int) -> Iterator[int]:
        yield from range(n)

    @endpoint
    async def letters(self) -> AsyncIterator[str]:
        yield "a"

    @endpoint(borrow=True)
    def borrowed(self, values: list[int]) -> int:
        return sum(values)


def test_endpoints_are_typed_by_the_methods_they_stand_for() -> None:
    mesh = this_proc().spawn("typed", Typed, 1)

    one: Future[int] = assert_type(mesh.add.call_one(2), Future[int])
    many: Future[ValueMesh[int]] = assert_type(mesh.add.call(2), Future[ValueMesh[int]])
    name: Future[str] = assert_type(mesh.title.call_one(), Future[str])
    half: Future[float] = assert_type(mesh.half.call_one(3.0), Future[float])
    items: ItemStream[int] = mesh.count.call_one(3)
    letters: ItemStream[str] = mesh.letters.call_one()

    assert one.get(timeout=10) == 3
    assert list(many.get(timeout=10)) == [5]
    assert name.get(timeout=10) == "typed"
    assert half.get(timeout=10) == 1.5
    assert list(items) == [0, 1, 2]
    assert list(letters) == ["a"]
    assert mesh.borrowed.call_one([1, 2]).get(timeout=10) == 3
    assert mesh.add.options(timeout=5).call_one(scatter([1])).get() == 6
    mesh.stop().get(timeout=10)
