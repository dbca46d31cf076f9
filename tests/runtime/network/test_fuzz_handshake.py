"""Strangers that speak ZMTP badly, to a real daemon and a real agent: both live on, stay small, let good callers in."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danaus.runtime.network.daemon_protocol import MAX_REQUEST_BYTES
from danaus.runtime.network.door import HANDSHAKE_MS
from danaus.runtime.network.keys import derive, read_key_file
from danaus.runtime.network.packets import MAX_MESSAGE_BYTES

from .daemons import ALONE, SECRET, run_daemon
from .fuzzing import fuzzed
from .strangers import (
    COMMAND,
    LONG,
    Target,
    command,
    connected,
    frame,
    greeting,
    hello,
    hung_up,
    open_connection,
    pour,
    reset,
    send,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
GROWTH_BYTES = 24 * MIB
"""What a process may gain by an attack that sends little; what malloc keeps of a few hundred connections."""
CURVE = greeting()
READY = command(b"READY", b"\x0bSocket-Type\x00\x00\x00\x06DEALER")


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    """A daemon, and the agent of a job that it has started: both real."""
    program = (sys.executable, "-m", "danaus.tools.host")
    with run_daemon(tmp_path_factory.mktemp("host"), command=program) as daemon:
        secret = read_key_file(daemon.key)
        kind, fields = daemon.call().attach("fuzzed", env=ALONE)
        assert kind == "attached", fields
        host_keys, job_keys = derive(secret, "caller", "host"), derive(SECRET, "caller", "job")
        yield {
            "daemon": Target(
                daemon.process.pid,
                daemon.endpoint,
                host_keys,
                derive(secret, "listener", "host").public,
                MAX_REQUEST_BYTES,
            ),
            "agent": Target(
                fields["pid"],
                fields["endpoint"],
                job_keys,
                derive(SECRET, "listener", "job").public,
                MAX_MESSAGE_BYTES,
            ),
        }


@pytest.fixture(params=["daemon", "agent"])
def target(request: pytest.FixtureRequest, targets: dict[str, Target]) -> Target:
    return targets[request.param]


OPENINGS: dict[str, bytes] = {
    "nothing": b"",
    "one byte": b"\xff",
    "half a greeting": CURVE[:20],
    "a greeting and nothing": CURVE,
    "noise": os.urandom(5000),
    "zeros": bytes(5000),
    "ff": b"\xff" * 5000,
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(500),
    "ZMTP 1": b"\x01\x00" + b"\x05\x00evil" * 50,
    "ZMTP 2": b"\xff" + bytes(8) + b"\x7f\x01\x05\x00\x00" + b"\x00\x04evil" * 50,
    "ZMTP 3.0": greeting(version=b"\x03\x00") + hello(),
    "ZMTP 9": greeting(version=b"\x09\x09") + hello(),
    "the listener's part": greeting(is_server=1) + hello(),
    "NULL": greeting(b"NULL") + READY + frame(b"evil", 0),
    "PLAIN": greeting(b"PLAIN") + command(b"HELLO", b"\x04root\x04root") + READY,
    "GSSAPI": greeting(b"GSSAPI") + command(b"INITIATE", bytes(100)),
    "no such mechanism": greeting(b"\xff" * 20) + READY,
    "READY without a handshake": CURVE + READY + frame(b"evil", 0),
    "HELLO in another's name": CURVE + hello(),
    "a short HELLO": CURVE + command(b"HELLO", b"\x01\x00"),
    "a long HELLO": CURVE + command(b"HELLO", bytes(5000)),
    "two HELLOs": CURVE + hello() + hello(),
    "INITIATE first": CURVE + command(b"INITIATE", os.urandom(400)),
    "HELLO and INITIATE": CURVE + hello() + command(b"INITIATE", os.urandom(400)),
    "MESSAGE first": CURVE + command(b"MESSAGE", os.urandom(100)),
    "PING first": CURVE + command(b"PING", b"\0\nctx") * 100,
    "ERROR first": CURVE + command(b"ERROR", b"\x04oops"),
    "SUBSCRIBE first": CURVE + command(b"SUBSCRIBE", b"x" * 100),
    "a message in place of a command": CURVE + frame(b"x" * 200, 0),
    "a command without a name": CURVE + frame(b""),
    "a name longer than its command": CURVE + frame(b"\xffHELLO"),
    "all flags": CURVE + frame(b"x" * 200, 0xFF),
    "2**64 - 1 bytes announced": CURVE + frame(b"x", COMMAND | LONG, announced=(1 << 64) - 1),
    "2**63 bytes announced": CURVE + frame(b"x", COMMAND | LONG, announced=1 << 63),
    "2 GiB announced": CURVE + frame(b"x", COMMAND | LONG, announced=1 << 31),
    "a short length in a long frame": CURVE + frame(b"x" * 10, COMMAND | LONG),
}


def test_it_survives_bad_openings(target: Target) -> None:
    for name, opening in OPENINGS.items():
        rss_bytes, num_fds = target.rss_bytes(), target.num_fds()

        connections = [open_connection(target) for _ in range(20)]
        for connection in connections:
            send(connection, opening)
        for index, connection in enumerate(connections):
            reset(connection) if index % 2 else connection.close()

        assert target.is_alive(), name
        target.check_lets_in()
        target.wait_num_fds(num_fds)
        assert target.rss_bytes() - rss_bytes < GROWTH_BYTES, name


@pytest.mark.parametrize(
    "endless",
    [
        command(b"PING", b"\0\nctx") * 200,
        frame(b"") * 5000,
        frame(b"x" * 200, 1) * 200,
        bytes(10_000),
        hello() * 50,
    ],
    ids=["pings", "empty commands", "parts of a message", "zeros", "HELLOs"],
)
def test_it_hangs_up_on_frames_without_end(target: Target, endless: bytes) -> None:
    rss_bytes = target.rss_bytes()

    with connected(target) as connection:
        send(connection, CURVE)
        pour(connection, endless, limit_s=3.0, most_bytes=256 * MIB)

        assert hung_up(connection)

    target.check_lets_in()
    assert target.rss_bytes() - rss_bytes < GROWTH_BYTES


def test_it_hangs_up_on_a_frame_over_its_bound_before_that_comes(target: Target) -> None:
    with connected(target) as connection:
        send(connection, CURVE + frame(b"x", COMMAND | LONG, announced=target.max_message_bytes + 1000))

        assert hung_up(connection, limit_s=2.0)


def test_full_frames_before_the_handshake_fill_little(target: Target) -> None:
    """A frame up to the bound is taken before the key is looked at: many connections at once multiply that."""
    count = 50
    rss_bytes = peak_bytes = target.rss_bytes()
    body = b"x" * (target.max_message_bytes - 100)
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(connected(target))
            connection.settimeout(1.0)
            # All but the last byte, so that nobody is hung up on yet.
            send(connection, CURVE + frame(body[:-1], COMMAND | LONG, announced=len(body)))
            peak_bytes = max(peak_bytes, target.rss_bytes())

        assert peak_bytes - rss_bytes < 100 * MIB
        target.check_lets_in()
    target.check_lets_in()


def test_connections_that_come_and_go_leave_nothing(target: Target) -> None:
    rss_bytes, num_fds = target.rss_bytes(), target.num_fds()

    for index in range(400):
        connection = open_connection(target)
        send(connection, CURVE[: index % 65])
        reset(connection) if index % 3 else connection.close()

    target.check_lets_in()
    target.wait_num_fds(num_fds)
    assert target.rss_bytes() - rss_bytes < GROWTH_BYTES


@pytest.mark.slow
def test_a_slow_loris_is_cut_off_while_good_callers_come_in(targets: dict[str, Target]) -> None:
    """Half-open handshakes, each kept alive by a byte now and then, end with the limit for all of the handshake."""
    rss_bytes = {name: target.rss_bytes() for name, target in targets.items()}
    with contextlib.ExitStack() as stack:
        by_target = {
            name: [stack.enter_context(connected(target)) for _ in range(150)] for name, target in targets.items()
        }
        started_s = time.monotonic()
        for position in range(8):
            for connections in by_target.values():
                for connection in connections:
                    send(connection, CURVE[position * 4 : position * 4 + 4])
            for target in targets.values():
                target.check_lets_in()

        for name, target in targets.items():
            assert target.rss_bytes() - rss_bytes[name] < GROWTH_BYTES
        limit_s = HANDSHAKE_MS / 1000 + 5.0
        for connections in by_target.values():
            for connection in connections:
                assert hung_up(connection, max(0.1, started_s + limit_s - time.monotonic()))
    for target in targets.values():
        target.check_lets_in()


ANNOUNCED = st.integers(0, (1 << 64) - 1) | st.integers(0, 300)
MECHANISMS = st.sampled_from([b"CURVE", b"NULL", b"PLAIN", b"x"])
COMMANDS = st.sampled_from([b"HELLO", b"INITIATE", b"MESSAGE", b"READY", b"ERROR", b"PING", b"PONG", b"WELCOME", b""])
PIECES = st.one_of(
    st.just(CURVE),
    st.builds(greeting, MECHANISMS, version=st.binary(min_size=2, max_size=2)),
    st.binary(max_size=80),
    st.builds(frame, st.binary(max_size=300), st.integers(0, 255)),
    st.builds(frame, st.binary(max_size=40), st.integers(0, 255), announced=ANNOUNCED),
    st.builds(command, COMMANDS, st.binary(max_size=300)),
    st.builds(hello, st.none() | st.binary(min_size=194, max_size=194)),
)


@pytest.mark.parametrize("name", ["daemon", "agent"])
@fuzzed(80)
@given(pieces=st.lists(PIECES, max_size=8), is_rude=st.booleans(), waits=st.booleans())
def test_it_survives_any_conversation(
    targets: dict[str, Target], name: str, pieces: list[bytes], is_rude: bool, waits: bool
) -> None:
    target = targets[name]

    converse(open_connection(target), pieces, is_rude=is_rude, waits=waits)

    assert target.is_alive()


def converse(connection: socket.socket, pieces: list[bytes], *, is_rude: bool, waits: bool) -> None:
    for piece in pieces:
        if not send(connection, piece):
            break
        if waits:
            # So that it comes as a packet of its own, after an answer to the one before.
            connection.settimeout(0.005)
            with contextlib.suppress(OSError):
                connection.recv(4096)
    reset(connection) if is_rude else connection.close()


def test_after_all_conversations_good_callers_come_in(target: Target) -> None:
    target.check_lets_in()


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_long_siege_leaves_a_process_as_large_as_before(target: Target) -> None:
    """What is not given back shows as growth from the second half of the siege on."""
    sizes: list[int] = []
    deadline_s = time.monotonic() + float(os.environ.get("DANAUS_SIEGE_S", "120"))
    openings = list(OPENINGS.values())
    turn = 0
    while time.monotonic() < deadline_s:
        for opening in openings:
            connection = open_connection(target)
            send(connection, opening)
            reset(connection) if turn % 2 else connection.close()
            turn += 1
        if turn % (50 * len(openings)) == 0:
            target.check_lets_in()
            sizes.append(target.rss_bytes())

    assert sizes[-1] - sizes[len(sizes) // 2] < 4 * MIB, sizes
