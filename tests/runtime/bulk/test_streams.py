"""Server and client of the streams: what is asked for comes, whatever is cut, and what strangers send does no harm."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from danaus.runtime.bulk import certificate, server, stream
from danaus.runtime.bulk.ends import end_for
from danaus.runtime.bulk.errors import BufferDropped, OwnerDied, TransferError, TransferTimeoutError
from danaus.runtime.bulk.memory import wrap
from danaus.runtime.bulk.progress import CalledOff
from danaus.runtime.bulk.protocol import REPLY_BYTES, Op, Request, Status, unpack_reply
from danaus.runtime.bulk.registry import Registry
from danaus.runtime.failure import FailureKind, MeshFailure

from .stand_ins import LIMIT_S, CuttingProxy, Served, progress, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("job")
    certificate.write(str(directory), certificate.mint())
    return directory


@pytest.fixture
def serve(job: Path) -> Iterator[Callable[[Any], Served]]:
    made = list[Served]()

    def make(thing: Any, directory: Path = job, *, is_plain: bool = False) -> Served:
        made.append(Served(directory, thing, is_plain=is_plain))
        return made[-1]

    yield make
    for served in made:
        served.close()


def numbers(size_bytes: int) -> Any:
    return np.random.default_rng(size_bytes).integers(0, 256, size_bytes, dtype="uint8")


def read(served: Served, into: Any, *, endpoint: Any = None, pid: int = 0, **fields: Any) -> None:
    memory = wrap(into)
    request = served.request(Op.READ, **fields)
    end = end_for(memory, request.length)
    served.clients.run(endpoint or served.endpoint, request, progress(request.length), end, pid=pid)


def write(served: Served, source: Any, *, endpoint: Any = None, pid: int = 0, **fields: Any) -> None:
    memory = wrap(source)
    request = served.request(Op.WRITE, length=memory.size_bytes, **fields)
    end = end_for(memory, request.length)
    served.clients.run(endpoint or served.endpoint, request, progress(request.length), end, pid=pid)


@pytest.mark.parametrize("by_unix", [True, False])
@pytest.mark.parametrize("size", [0, 1, MIB - 1, 3 * MIB + 5])
def test_bytes_are_read_and_written(serve: Callable[[Any], Served], size: int, by_unix: bool) -> None:
    data, pid = numbers(size), os.getpid() if by_unix else 0
    served = serve(data.copy())
    got = np.zeros(size, "uint8")

    read(served, got, pid=pid)
    assert (got == data).all()
    write(served, data[::-1].copy(), pid=pid)
    assert (served.memory.owner == data[::-1]).all()


def test_strided_memory_is_gathered_and_scattered_on_both_sides(serve: Callable[[Any], Served]) -> None:
    base = np.arange(3000 * 1001, dtype="int32").reshape(3000, 1001)
    served = serve(base[::-1, ::2])
    target = np.zeros((501, 3000), "int32").T

    read(served, target)
    assert (target.T == base[::-1, ::2].T).all()
    write(served, (target * 3).T.copy().T)
    assert (base[::-1, ::2] == target * 3).all()
    assert (base[:, 1::2] == np.arange(3000 * 1001).reshape(3000, 1001)[:, 1::2]).all()


def test_a_part_is_read_and_written(serve: Callable[[Any], Served]) -> None:
    served = serve(bytearray(range(100)))
    got = bytearray(10)

    read(served, got, offset=20, length=10)
    assert got == bytes(range(20, 30))
    write(served, b"abc", offset=97)
    assert bytes(served.memory.owner)[94:] == bytes([94, 95, 96]) + b"abc"


def test_connections_are_used_again(serve: Callable[[Any], Served]) -> None:
    served, got = serve(bytearray(b"12345")), bytearray(5)

    for _ in range(5):
        read(served, got)

    assert served.clients.num_connected == 1


def test_a_connection_that_the_server_closed_meanwhile_is_replaced(
    serve: Callable[[Any], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "IDLE_S", 0.05)
    served, got = serve(bytearray(b"12345")), bytearray(5)
    read(served, got)
    wait_until(lambda: not served.server._connections)

    read(served, got)

    assert served.clients.num_connected == 2
    assert served.server.num_refused == 0


@pytest.mark.parametrize("way", ["read", "write"])
def test_a_transfer_goes_on_where_its_connection_was_cut(serve: Callable[[Any], Served], way: str) -> None:
    data = numbers(8 * MIB)
    served = serve(data.copy() if way == "read" else np.zeros_like(data))
    proxy = CuttingProxy(served.endpoint.port, [0, 100, 3000, 2 * MIB, 3 * MIB])
    endpoint = served.endpoint._replace(port=proxy.port)

    if way == "read":
        got = np.zeros_like(data)
        read(served, got, endpoint=endpoint)
        assert (got == data).all()
    else:
        write(served, data, endpoint=endpoint)
        assert (served.memory.owner == data).all()

    assert proxy.num_connections == 6
    served.clients.close()
    proxy.close()


def test_a_cut_read_of_strided_memory_goes_on_at_a_whole_element(serve: Callable[[Any], Served]) -> None:
    base = np.arange(2_000_000, dtype="int64").reshape(1000, 2000)
    served, got = serve(base[:, ::2]), np.zeros((1000, 1000), "int64")
    proxy = CuttingProxy(served.endpoint.port, [1_000_003, 5_000_001])

    read(served, got, endpoint=served.endpoint._replace(port=proxy.port))

    assert (got == base[:, ::2]).all()
    assert proxy.num_connections == 3
    served.clients.close()
    proxy.close()


def test_a_dropped_buffer_is_not_served(serve: Callable[[Any], Served]) -> None:
    served = serve(bytearray(100))
    served.registry.close_to_others(served.registration)

    with pytest.raises(BufferDropped, match="the buffer: it was dropped"):
        read(served, bytearray(100))
    with pytest.raises(BufferDropped):
        write(served, bytearray(100))


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_a_drop_ends_a_transfer_under_way_although_its_peer_is_slow(serve: Callable[[Any], Served], op: Op) -> None:
    served = serve(np.zeros(64 * MIB, "uint8"))
    with connect(served) as connection:
        connection.sendall(served.request(op).pack())
        assert unpack_reply(stream.receive_exactly(connection, REPLY_BYTES))[0] == Status.OK
        wait_until(lambda: bool(served.registration.users))

        served.registry.close_to_others(served.registration)
        served.registry.let_go(served.registration)

        assert not served.registration.users
        assert served.registry.is_unused(served.registration)


def connect(served: Served) -> Any:
    context = certificate.contexts(str(served.clients._directory()))[1]
    raw = socket.create_connection(("127.0.0.1", served.endpoint.port), LIMIT_S)
    return context.wrap_socket(raw)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"length": 101}, r"\[0, 101\) lies outside its 100 bytes"),
        ({"offset": 96, "length": 8}, r"\[96, 104\) lies outside its 100 bytes"),
        ({"offset": 2, "length": 4}, "lies outside"),
        ({"offset": 0, "length": 6}, "lies outside"),
    ],
)
def test_bounds_are_checked_by_the_owner(serve: Callable[[Any], Served], fields: dict[str, int], reason: str) -> None:
    served = serve(np.zeros(25, "int32"))

    with pytest.raises(TransferError, match=reason):
        read(served, bytearray(200), **fields)
    wait_until(lambda: served.server.num_refused == 1)


def test_read_only_memory_is_not_written_whatever_is_asked(serve: Callable[[Any], Served]) -> None:
    served = serve(b"constant")

    with pytest.raises(TransferError, match="read-only"):
        write(served, b"variable")
    assert served.memory.owner == b"constant"


def test_a_wrong_token_gets_nothing(serve: Callable[[Any], Served]) -> None:
    served, got = serve(bytearray(b"secret")), bytearray(6)

    with pytest.raises(BufferDropped):
        read(served, got, token=bytes(16))
    assert got == bytes(6)


def test_another_jobs_certificate_is_refused_at_once_by_both_ends(
    serve: Callable[..., Served], tmp_path: Path, job: Path
) -> None:
    certificate.write(str(tmp_path), certificate.mint())
    served, stranger = serve(bytearray(b"secret")), serve(bytearray(6), tmp_path)
    served.clients, stranger.clients = stranger.clients, served.clients

    with pytest.raises(TransferError, match=r"refused the connection.*verify failed"):
        read(served, bytearray(6))
    wait_until(lambda: served.server.num_refused == 1)


def test_a_client_without_a_certificate_is_refused(serve: Callable[[Any], Served], job: Path) -> None:
    served = serve(bytearray(b"secret"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(str(job / certificate.FILE))
    raw = socket.create_connection(("127.0.0.1", served.endpoint.port), LIMIT_S)
    with context.wrap_socket(raw) as connection, pytest.raises((ssl.SSLError, ConnectionError)):
        # With TLS 1.3 the client hears of it after the handshake.
        _ask(connection, served.request(Op.READ))

    wait_until(lambda: served.server.num_refused == 1)


def _ask(connection: socket.socket, request: Request) -> bytes:
    connection.sendall(request.pack())
    return stream.receive_exactly(connection, 1)


def test_tls_below_1_3_is_refused(serve: Callable[[Any], Served]) -> None:
    served = serve(bytearray(b"secret"))
    context = certificate.contexts(str(served.clients._directory()))[1]
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", served.endpoint.port), LIMIT_S) as raw, pytest.raises(ssl.SSLError):
        context.wrap_socket(raw)

    wait_until(lambda: served.server.num_refused == 1)


def test_without_a_certificate_a_process_is_not_reachable_from_other_hosts(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve(bytearray(b"local"), tmp_path)
    got = bytearray(5)

    assert served.endpoint.port == 0
    with pytest.raises(TransferError, match=r"no certificate \(tls.pem\)"):
        read(served, got)
    read(served, got, pid=os.getpid())
    assert got == b"local"


def test_streams_are_plain_only_where_both_ends_say_so(serve: Callable[..., Served]) -> None:
    plain, encrypted, got = serve(bytearray(b"open"), is_plain=True), serve(bytearray(4)), bytearray(4)

    read(plain, got)
    assert (got, plain.endpoint.scheme) == (b"open", "tcp")

    plain.clients, encrypted.clients = encrypted.clients, plain.clients
    with pytest.raises(TransferError, match=r"unencrypted \(DANAUS_PLAIN_BULK\), which is not switched on here"):
        read(plain, got)
    read(encrypted, got)
    assert got == bytes(4)


def test_a_port_of_the_given_ones_is_taken(job: Path) -> None:
    registry = Registry()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="widen DANAUS_BULK_PORTS"):
            server.Server(str(job), "127.0.0.1", registry, ports=range(port, port + 1))
        made = server.Server(str(job), "127.0.0.1", registry, ports=range(port, port + 50))
        assert port < made.endpoint.port < port + 50
        made.close()
    registry.close()


def test_garbage_is_dropped_and_counted_and_the_server_goes_on(serve: Callable[[Any], Served]) -> None:
    served, got = serve(bytearray(b"12345")), bytearray(5)
    dice = random.Random(5)
    for number in range(60):
        by_tls = number % 3 == 0
        try:
            connection = connect(served) if by_tls else _raw(served, by_unix=number % 3 == 1)
            with connection:
                connection.sendall(_garbage(dice, served))
                _read_to_end(connection)
        except (OSError, ssl.SSLError):
            # It hung up while we were still talking.
            continue

    wait_until(lambda: not served.server._connections)
    assert served.server.num_refused == 60
    read(served, got)
    assert got == b"12345"


def _garbage(dice: random.Random, served: Served) -> bytes:
    """Noise; a request that breaks off; a request with a bit turned in its magic; a text of another protocol."""
    request = bytearray(served.request(Op.READ).pack())
    kind = dice.randrange(4)
    if kind == 0:
        return b"\0" + dice.randbytes(dice.randrange(64, 5000))
    if kind == 1:
        return bytes(request[: dice.randrange(len(request))])
    if kind == 2:
        request[dice.randrange(4)] ^= 1 << dice.randrange(8)
        return bytes(request)
    return b"GET / HTTP/1.1\r\nHost: " + b"a" * 60 + b"\r\n\r\n"


def _raw(served: Served, *, by_unix: bool) -> socket.socket:
    if not by_unix:
        return socket.create_connection(("127.0.0.1", served.endpoint.port), LIMIT_S)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(LIMIT_S)
    connection.connect(f"\0{served.endpoint.unix}")
    return connection


def _read_to_end(connection: socket.socket) -> None:
    if isinstance(connection, ssl.SSLSocket):
        connection.unwrap()
        return
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(4096):
        pass


def test_a_peer_that_says_nothing_is_dropped(serve: Callable[[Any], Served], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_S", 0.05)
    served = serve(bytearray(5))

    with _raw(served, by_unix=False) as connection:
        assert connection.recv(1) == b""
    wait_until(lambda: served.server.num_refused == 1)


def test_a_handshake_that_is_too_slow_is_ended(serve: Callable[[Any], Served], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_S", 0.2)
    served = serve(bytearray(5))
    # The beginning of a ClientHello of 512 bytes.
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(400)

    with _raw(served, by_unix=False) as connection, pytest.raises(ConnectionError):  # noqa: PT012  the last of several
        connection.settimeout(0.02)
        for byte in hello:
            connection.sendall(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                stream.receive_exactly(connection, 1)
    wait_until(lambda: served.server.num_refused == 1)


def test_a_first_transfer_may_take_longer_than_a_handshake(serve: Callable[[Any], Served]) -> None:
    size = 16 * MIB
    served, into = serve(bytearray(size)), bytearray(size)
    with connect(served) as connection:
        connection.sendall(served.request(Op.READ).pack())
        stream.receive_exactly(connection, REPLY_BYTES)

        # Before the transfer is over: who is no stranger has no limit any more.
        wait_until(lambda: not served.server._strangers)
        assert served.registration.users
        stream.receive(connection, memoryview(into))


def test_a_peer_that_speaks_too_slowly_is_dropped(
    serve: Callable[[Any], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_S", 0.2)
    served = serve(bytearray(5))
    request = served.request(Op.READ).pack()

    with _raw(served, by_unix=True) as connection, pytest.raises(ConnectionError):  # noqa: PT012  the last of several
        connection.settimeout(0.02)
        for byte in request[:-1]:
            # Each byte alone comes well within the limit.
            connection.sendall(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                stream.receive_exactly(connection, 1)
    wait_until(lambda: served.server.num_refused == 1)


@pytest.mark.parametrize("bound", ["MAX_CONNECTIONS", "MAX_STRANGERS"])
def test_connections_are_bounded(serve: Callable[[Any], Served], monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    monkeypatch.setattr(server, bound, 3)
    served = serve(bytearray(5))
    held = [_raw(served, by_unix=True) for _ in range(3)]
    wait_until(lambda: len(served.server._connections) == 3)

    with _raw(served, by_unix=True) as connection:
        assert connection.recv(1) == b""
    for connection in held:
        connection.close()


def test_a_server_that_sends_garbage_is_asked_again_until_the_time_is_over(serve: Callable[[Any], Served]) -> None:
    served = serve(bytearray(5))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as liar:
        liar.bind(f"\0danaus-test-{os.getpid()}")
        liar.listen()
        liar.settimeout(0.05)
        is_over = threading.Event()

        def lie() -> None:
            while not is_over.is_set():
                with contextlib.suppress(TimeoutError), liar.accept()[0] as connection:
                    connection.sendall(b"nonsense" * 4)

        thread = threading.Thread(target=lie, daemon=True)
        thread.start()
        endpoint = served.endpoint._replace(unix=f"danaus-test-{os.getpid()}")
        request = served.request(Op.READ)
        with pytest.raises(TransferTimeoutError, match=r"0 of 5 bytes within 0.5 s \(last: "):
            served.clients.run(
                endpoint, request, progress(5, timeout_s=0.5), end_for(wrap(bytearray(5)), 5), pid=os.getpid()
            )
        is_over.set()
        thread.join(LIMIT_S)


def test_another_process_at_the_owners_socket_is_not_believed(serve: Callable[[Any], Served]) -> None:
    served, got = serve(bytearray(b"12345")), bytearray(5)
    request = served.request(Op.READ)

    with pytest.raises(TransferTimeoutError, match="another process than"):
        served.clients.run(
            served.endpoint, request, progress(5, timeout_s=0.5), end_for(wrap(got), 5), pid=os.getpid() + 1
        )
    assert got == bytes(5)


def test_an_owners_death_ends_the_attempts(serve: Callable[[Any], Served]) -> None:
    served = serve(bytearray(5))
    served.server.close()
    served.server._thread.join(LIMIT_S)
    failure = MeshFailure(kind=FailureKind.KILLED, mesh="owners", rank=0, host="far", signum=9)

    def check() -> None:
        raise OwnerDied("the buffer", failure)

    request = served.request(Op.READ)
    with pytest.raises(OwnerDied, match=r"mesh 'owners' rank 0.*was killed by SIGKILL"):
        served.clients.run(served.endpoint, request, progress(5, check_owner=check), end_for(wrap(bytearray(5)), 5))


def test_a_transfer_that_nobody_wants_any_more_ends(serve: Callable[[Any], Served]) -> None:
    served = serve(bytearray(5))
    ended = progress(5)
    ended.call_off()

    with pytest.raises(CalledOff):
        served.clients.run(served.endpoint, served.request(Op.READ), ended, end_for(wrap(bytearray(5)), 5))


def test_a_certificate_is_written_for_its_user_alone(tmp_path: Path) -> None:
    assert not certificate.exists(str(tmp_path))
    certificate.write(str(tmp_path), certificate.mint())

    assert certificate.exists(str(tmp_path))
    assert (tmp_path / certificate.FILE).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [certificate.FILE]
