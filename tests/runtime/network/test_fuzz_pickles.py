"""No stranger's pickle is ever loaded: one that would leave a file behind is sent in every way a stranger has.

The job is a real one, on two hosts, with memory lent out; a stranger finds every port that any of its processes listens
on, as a scan would, and every abstract socket.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import ssl
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
import psutil
import pytest
import zmq

import danaus
from danaus import Actor, RemoteBuffer, attach_to_hosts, endpoint
from danaus.runtime.bulk import certificate
from danaus.runtime.bulk.protocol import Op, Request
from danaus.runtime.messages import wire
from danaus.runtime.network import packets
from danaus.runtime.network.door import connect
from danaus.runtime.network.keys import derive, format_key, read_key_file

from .hosts import daemons
from .strangers import command, frame, greeting, reset

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .hosts import Daemons

pytestmark = pytest.mark.timeout(60)

LIMIT_S = 20.0


class Mine:
    """Leaves a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


class Keeper(Actor):
    """Lends memory, so that its process listens for streams."""

    @endpoint
    def lend(self) -> RemoteBuffer:
        self.data = np.arange(1000.0)
        self.buffer = RemoteBuffer(self.data)
        return self.buffer

    @endpoint
    def first(self) -> float:
        return float(self.data[0])


class Job:
    """A job on two hosts, as a stranger sees it and as its owner does."""

    def __init__(self, found: Daemons, keepers: Keeper, others: set[tuple[str, int]]) -> None:
        self.daemons, self.keepers, self._others = found, keepers, others

    def processes(self) -> list[psutil.Process]:
        """Those of the daemons, and all below them."""
        tops = [psutil.Process(process.pid) for process in self.daemons.processes]
        return [*tops, *(below for top in tops for below in top.children(recursive=True))]

    def ports(self) -> set[tuple[str, int]]:
        """Every tcp port that is listened on, by a process of the job or by the controller."""
        return listening([*self.processes(), *own_processes()]) - self._others

    def check_lives(self) -> None:
        assert list(self.keepers.first.call().get(timeout=LIMIT_S).values()) == [0.0, 0.0]


def own_processes() -> list[psutil.Process]:
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def listening(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    found: set[tuple[str, int]] = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in process.net_connections(kind="tcp"):
                if each.status == psutil.CONN_LISTEN:
                    found.add(("127.0.0.1", each.laddr.port))
    return found


@pytest.fixture(scope="module")
def job() -> Iterator[Job]:
    # Libraries that other modules have used go on listening.
    others = listening(own_processes())
    with daemons(2) as found:
        hosts = attach_to_hosts(found.addresses, key=found.key)
        with hosts.spawn_procs() as procs:
            keepers = procs.spawn("keepers", Keeper)
            buffers = list(keepers.lend.call().get(timeout=LIMIT_S).values())
            # Read by the controller, over the network: their processes listen from now on.
            for buffer in buffers:
                into = np.zeros(1000)
                buffer.read_into(into).get(timeout=LIMIT_S)
                assert into[999] == 999.0
            yield Job(found, keepers, others)
        danaus.shutdown_context()


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return tmp_path / "loaded"


def test_the_pickle_would_leave_a_file(mine: Path) -> None:
    pickle.loads(pickle.dumps(Mine(mine))).close()

    assert mine.exists()


def spoken(pickled: bytes) -> list[bytes]:
    """What a stranger says on a plain connection."""
    call = wire.pack([wire.CALL, "keepers", "first", "a.0", "root", 1, 0, None, 0, pickled, None])
    spawn = wire.pack([wire.SPAWN, "evil", "a.0", [0, False, None, None], pickled, None])
    reply = wire.pack([wire.REPLY, 1, 0, wire.OK, 0, pickled, None])
    attach = msgpack.packb(["attach", 1, {"job": "x", "slot": 1, "incarnation": 9, "secret": pickled[:32].ljust(32)}])
    data = packets.pack_data(0, 0, [[1, 0, 1]])
    bodies = [pickled, call, spawn, reply, attach or b"", data + pickled]
    ready = command(b"READY", b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER")
    said = [*bodies, *(struct.pack(">I", len(body)) + body for body in bodies)]
    for mechanism in (b"NULL", b"PLAIN", b"CURVE"):
        opening = (
            greeting(mechanism) + (command(b"HELLO", b"\x04root\x04root") if mechanism == b"PLAIN" else b"") + ready
        )
        said += [opening + frame(body, 0) for body in bodies]
        said += [opening + frame(data, 1) + frame(wire.pack([packets.PLAIN, "a@1x1.0"]), 1) + frame(call, 0)]
        # A peer that listens says READY, too, and messages of an older ZMTP need none.
        said += [greeting(mechanism, version=b"\x03\x00", is_server=1) + ready + frame(call, 0)]
    said += [b"\xff" + bytes(8) + b"\x7f\x01\x05\x00\x00" + frame(call, 0), b"\x01\x00" + frame(call, 0)]
    for op in Op:
        said.append(Request(op, os.urandom(16), 0, 1, 0, len(pickled)).pack() + pickled)
    return said


def say(where: socket.socket, data: bytes) -> None:
    where.settimeout(0.5)
    with contextlib.suppress(OSError):
        where.sendall(data)
        where.recv(1000)
    with contextlib.suppress(OSError):
        where.sendall(data)
    reset(where) if where.family == socket.AF_INET else where.close()


def test_on_every_port_of_every_process(job: Job, mine: Path) -> None:
    ports = job.ports()
    # Two daemons, two agents and two processes that lend memory, at least.
    assert len(ports) >= 6

    for port in ports:
        for data in spoken(pickle.dumps(Mine(mine))):
            with contextlib.suppress(ConnectionError):
                say(socket.create_connection(port, timeout=LIMIT_S), data)

    job.check_lives()
    assert not mine.exists()


@pytest.mark.parametrize("kind", ["none", "of another job"])
def test_by_tls_with_the_wrong_certificate(job: Job, mine: Path, tmp_path: Path, kind: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if kind != "none":
        certificate.write(str(tmp_path), certificate.mint())
        context.load_cert_chain(tmp_path / certificate.FILE)
    pickled = pickle.dumps(Mine(mine))
    secured = 0
    for port in job.ports():
        for op in Op:
            with contextlib.suppress(OSError), socket.create_connection(port, timeout=LIMIT_S) as plain:
                plain.settimeout(0.5)
                with context.wrap_socket(plain) as stranger:
                    secured += 1
                    say(stranger, Request(op, os.urandom(16), 0, 1, 0, len(pickled)).pack() + pickled)

    # TLS 1.3: the stranger's part is over before the server has looked at the certificate.
    assert secured
    job.check_lives()
    assert not mine.exists()


def test_by_curve_with_a_key_of_its_own(job: Job, mine: Path) -> None:
    """A stranger who even knows the listener's public key, on every port; and one who expects its own."""
    own = derive(b"s" * 32, "caller", "host")
    publics = [
        derive(read_key_file(job.daemons.key), "listener", "host").public,
        derive(b"s" * 32, "listener", "job").public,
    ]
    context: zmq.Context[Any] = zmq.Context()
    pickled = pickle.dumps(Mine(mine))
    callers = [
        connect(context, zmq.DEALER, f"tcp://{host}:{port}", own, public, options={zmq.ROUTING_ID: b"0.0.00"})
        for host, port in job.ports()
        for public in publics
    ]
    for caller in callers:
        caller.send(pickled)
        caller.send_multipart([packets.pack_data(0, 0, [[1, 0, 1]]), wire.pack([packets.PLAIN, "keepers.0"]), pickled])

    poller = zmq.Poller()
    for caller in callers:
        poller.register(caller, zmq.POLLIN)
    assert poller.poll(500) == []

    for caller in callers:
        caller.close(0)
    context.term()
    job.check_lives()
    assert not mine.exists()


def test_on_abstract_sockets_of_this_machine(job: Job, mine: Path) -> None:
    names = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "@danaus-" in line}
    assert names

    for name in names:
        for data in spoken(pickle.dumps(Mine(mine))):
            stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with contextlib.suppress(OSError):
                stranger.connect("\0" + name[1:])
            say(stranger, data)

    job.check_lives()
    assert not mine.exists()


KNOCK = """
import os, socket, sys
os.setresuid(65534, 65534, 65534)  # nobody; not before, since Python may lie where nobody may read
hung_up = 0
for name in sys.argv[2:]:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(10)
        stranger.connect("\\0" + name[1:])
        try:
            stranger.sendall(bytes.fromhex(sys.argv[1]))
            hung_up += not stranger.recv(100)
        except ConnectionError:
            hung_up += 1
print(hung_up)
"""


@pytest.mark.root
def test_another_user_of_this_machine_is_not_listened_to(job: Job, mine: Path) -> None:
    """Abstract sockets have no modes: the kernel's word on who connects is what counts."""
    names = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "@danaus-" in line}
    payload = Request(Op.READ, bytes(16), 0, 1, 0, 8).pack() + pickle.dumps(Mine(mine))

    stranger = subprocess.run(
        [sys.executable, "-I", "-S", "-c", KNOCK, payload.hex(), *names],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )

    assert int(stranger.stdout) == len(names)
    job.check_lives()
    assert not mine.exists()


def job_directories() -> list[Path]:
    """Of all agents of this test run."""
    return list(Path(os.environ["DANAUS_SOCKET_DIR"]).glob("danaus-*"))


def test_directories_and_certificates_are_for_their_owner_alone(job: Job) -> None:
    # The controller's own, and one for each host.
    assert len(job_directories()) >= 3

    for directory in job_directories():
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE((directory / certificate.FILE).stat().st_mode) == 0o600


def test_no_process_shows_a_key(job: Job) -> None:
    """Neither its command line nor its environment, which other users, reports and logs can see."""
    secret = read_key_file(job.daemons.key)
    hidden = [secret, secret.hex().encode(), format_key(secret).strip(), b"PRIVATE KEY"]
    for directory in job_directories():
        pem = (directory / certificate.FILE).read_bytes()
        hidden += [line for line in pem.splitlines() if len(line) > 32]

    for process in job.processes():
        shown = b"".join(Path(f"/proc/{process.pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
        assert shown
        assert not [each for each in hidden if each in shown]
