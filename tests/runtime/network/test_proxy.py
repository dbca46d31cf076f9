"""The proxy of the tests itself, with plain sockets."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

import pytest

from .proxy import Direction, Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

# Shared machines are slow at times.
pytestmark = pytest.mark.timeout(60)

LIMIT_S = 5.0
HELD_S = 0.1
"""How long a byte that must not arrive is waited for."""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LIMIT_S)
        yield server


@pytest.fixture
def proxy(listener: socket.socket) -> Iterator[Proxy]:
    with Proxy(f"tcp://127.0.0.1:{listener.getsockname()[1]}") as running:
        yield running


@pytest.fixture
def pair(listener: socket.socket, proxy: Proxy) -> Iterator[tuple[socket.socket, socket.socket]]:
    near = connect(proxy)
    far = listener.accept()[0]
    far.settimeout(LIMIT_S)
    with near, far:
        # The proxy knows of both ends once a byte has passed.
        far.sendall(b".")
        assert read(near, 1) == b"."
        yield near, far


def connect(proxy: Proxy) -> socket.socket:
    host, _, port = proxy.address.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=LIMIT_S)


def is_silent(end: socket.socket) -> bool:
    end.settimeout(HELD_S)
    try:
        return not end.recv(1)
    except TimeoutError:
        return True
    finally:
        end.settimeout(LIMIT_S)


def is_ended(end: socket.socket) -> bool:
    try:
        return not end.recv(1)
    except ConnectionResetError:
        return True


def read(end: socket.socket, size_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < size_bytes and (part := end.recv(size_bytes - len(data))):
        data += part
    return bytes(data)


def test_bytes_pass_both_ways(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    near.sendall(b"there")
    assert read(far, 5) == b"there"
    far.sendall(b"back")
    assert read(near, 4) == b"back"


def test_more_than_the_proxy_holds_passes_unharmed(pair: tuple[socket.socket, socket.socket], proxy: Proxy) -> None:
    near, far = pair
    sent = bytes(range(256)) * (1 << 12)
    proxy.cut()
    near.sendall(sent[: 1 << 16])
    proxy.heal()
    near.sendall(sent[1 << 16 :])
    assert read(far, len(sent)) == sent


def test_delay_is_added(pair: tuple[socket.socket, socket.socket], proxy: Proxy) -> None:
    near, far = pair
    proxy.delay_s = 0.05
    began_s = time.monotonic()
    near.sendall(b"a")
    read(far, 1)
    assert time.monotonic() - began_s >= 0.05


def test_cut_holds_bytes_until_it_is_healed(pair: tuple[socket.socket, socket.socket], proxy: Proxy) -> None:
    near, far = pair
    proxy.cut()
    near.sendall(b"a")
    far.sendall(b"b")
    assert is_silent(far)
    assert is_silent(near)
    proxy.heal()
    assert (read(far, 1), read(near, 1)) == (b"a", b"b")


@pytest.mark.parametrize("direction", Direction)
def test_cut_of_one_direction_lets_the_other_pass(
    pair: tuple[socket.socket, socket.socket], proxy: Proxy, direction: Direction
) -> None:
    near, far = pair
    proxy.cut(direction)
    near.sendall(b"a")
    far.sendall(b"b")
    passed, held = (near, far) if direction is Direction.OUT else (far, near)
    assert read(passed, 1) in {b"a", b"b"}
    assert is_silent(held)
    proxy.heal(direction)
    assert read(held, 1) in {b"a", b"b"}


def test_kill_resets_both_ends_and_a_new_connection_passes(
    pair: tuple[socket.socket, socket.socket], proxy: Proxy, listener: socket.socket
) -> None:
    assert proxy.kill() == 1
    for end in pair:
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    with connect(proxy) as near, listener.accept()[0] as far:
        near.sendall(b"a")
        assert read(far, 1) == b"a"
    assert proxy.num_accepted == 2


def test_kill_loses_what_was_held(
    pair: tuple[socket.socket, socket.socket], proxy: Proxy, listener: socket.socket
) -> None:
    proxy.cut()
    pair[0].sendall(b"lost")
    proxy.kill()
    proxy.heal()
    with pytest.raises(ConnectionResetError):
        pair[1].recv(1)


def test_end_of_one_side_reaches_the_other(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    near.sendall(b"a")
    near.shutdown(socket.SHUT_WR)
    assert read(far, 2) == b"a"
    far.sendall(b"b")
    far.close()
    assert read(near, 2) == b"b"


def test_target_that_is_not_there_ends_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with Proxy(f"tcp://127.0.0.1:{port}") as proxy, connect(proxy) as near:
        assert is_ended(near)
