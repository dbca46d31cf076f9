"""Replies that wait for others are not overtaken by what the same process sends to the same caller after them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danaus.runtime.messages.wire import pack
from danaus.runtime.network import packets
from danaus.runtime.network.carrier import Member
from danaus.runtime.network.router import Router

if TYPE_CHECKING:
    from collections.abc import Collection

CALLER = "caller@1x1.0"
PORT = 7


class NoSockets:
    """Neighbours that keep what is sent to them."""

    endpoint = ""

    def __init__(self) -> None:
        self.sent: list[list[Any]] = []
        self.heard_s: dict[int, float] = {}
        self.children: Collection[int] = ()

    def set_children(self, endpoints: dict[int, str], *, now_s: float) -> list[int]:
        self.children = list(endpoints)
        return []

    def send(self, _slot: int, frames: list[Any], *, now_s: float) -> bool:
        self.sent.append(frames)
        return True


def a_router(delivered: list[bytes]) -> tuple[Router, NoSockets]:
    sockets: Any = NoSockets()
    router = Router(
        0,
        0,
        "host",
        lambda _on_message: sockets,
        deliver=lambda _proc, frames: delivered.append(frames[0]),
        on_agent_message=lambda _origin, _data: None,
        on_lost=lambda _slot, _loss: None,
        on_member=lambda _slot: None,
    )
    members = [Member(0, 0, "", "here"), Member(1, 0, "tcp://127.0.0.1:1", "there")]
    router.set_members(members, {}, epoch=1, fan_out=8, gateway=0)
    sockets.sent.clear()
    return router, sockets


def test_a_cast_takes_along_the_replies_that_wait_on_the_way_out() -> None:
    router, sockets = a_router([])
    router._leaving.expect((CALLER, PORT), 2)
    router.from_process([pack([packets.REPLY, CALLER, PORT]), b"reply"])
    assert sockets.sent == []

    router.from_process([pack([packets.CAST, {1: [[CALLER, 0]]}, "me.0", 0, b""]), b"head", b"tail"])

    assert [frames[2] for frames in sockets.sent] == [b"reply", b"head"]


def test_a_cast_takes_along_the_replies_that_wait_on_arrival() -> None:
    delivered: list[bytes] = []
    router, _ = a_router(delivered)
    router._arriving.expect(("me.0", PORT), 2)
    router._open(1, pack([packets.REPLY, "me.0", PORT]), [b"reply"])
    assert delivered == []

    router._open(1, pack([packets.CAST, {0: [["me.0", 3]]}, CALLER, 0, b""]), [b"head", b"tail"])

    assert delivered == [b"reply", b"head" + pack(3) + b"tail"]
