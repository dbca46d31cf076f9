"""The network of namespaces itself, with plain sockets."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from .namespaces import Host, Network, missing, remove_stale

if TYPE_CHECKING:
    import socket
    from collections.abc import Generator, Iterator

if lacking := missing():
    # Of a module, since tests that are marked may be skipped for want of what the marker says only.
    pytest.skip(lacking, allow_module_level=True)

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

LIMIT_S = 5.0
HELD_S = 0.2
"""How long a byte that must not arrive is waited for."""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(2) as made:
        yield made


@pytest.fixture(autouse=True)
def _healed(network: Network) -> Iterator[None]:
    yield
    network.heal()


@contextmanager
def connected(source: Host, dest: Host) -> Generator[tuple[socket.socket, socket.socket]]:
    with dest.open_socket() as listener, source.open_socket() as near:
        listener.bind((dest.address, 0))
        listener.listen()
        for end in (listener, near):
            end.settimeout(LIMIT_S)
        near.connect(listener.getsockname())
        with listener.accept()[0] as far:
            far.settimeout(LIMIT_S)
            yield near, far


def passes(source: socket.socket, dest: socket.socket, *, limit_s: float = LIMIT_S) -> bool:
    dest.settimeout(limit_s)
    source.sendall(b"x")
    try:
        return dest.recv(1) == b"x"
    except TimeoutError:
        return False


def listing() -> str:
    commands = (["ip", "netns", "list"], ["ip", "-o", "link"])
    return "".join(subprocess.run(words, capture_output=True, text=True, check=True).stdout for words in commands)


def test_all_hosts_reach_one_another(network: Network) -> None:
    first, second = network.hosts
    for source, dest in ((network.here, first), (first, network.here), (first, second)):
        with connected(source, dest) as (near, far):
            assert near.getpeername()[0] == dest.address
            assert far.getpeername()[0] == source.address
            assert passes(near, far)
            assert passes(far, near)


def test_command_runs_on_the_host_with_the_pid_of_its_process(network: Network) -> None:
    program = "import os, subprocess; print(os.getpid(), subprocess.getoutput('ip -o -4 address'))"
    words = network.hosts[0].command(sys.executable, "-c", program)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        pid, addresses = process.communicate(timeout=LIMIT_S)[0].split(maxsplit=1)
    assert int(pid) == process.pid
    assert network.hosts[0].address in addresses
    assert network.here.address not in addresses


def test_cut_host_is_reached_again_after_healing(network: Network) -> None:
    first, second = network.hosts
    with connected(network.here, first) as (near, far), connected(network.here, second) as (other_near, other_far):
        network.cut(first)
        assert not passes(near, far, limit_s=HELD_S)
        assert not passes(far, near, limit_s=HELD_S)
        assert passes(other_near, other_far)
        network.heal()
        far.settimeout(LIMIT_S)
        assert far.recv(1) == b"x", "the kernel sends again what was lost"


@pytest.mark.parametrize("is_from_here", [False, True])
def test_drop_stops_one_direction(network: Network, is_from_here: bool) -> None:
    host = network.hosts[0]
    source, dest = (network.here, host) if is_from_here else (host, network.here)
    with connected(source, dest) as (near, far):
        network.drop(source, dest)
        assert passes(far, near), "the other direction is open"
        assert not passes(near, far, limit_s=HELD_S)
        network.heal()
        far.settimeout(LIMIT_S)
        assert far.recv(1) == b"x"


def test_random_loss_is_made_good_by_the_kernel(network: Network) -> None:
    host = network.hosts[0]
    with connected(network.here, host) as (near, far):
        network.lose(host, 0.1)
        # Not one of 300 is lost in one run of 10**13.
        for _ in range(300):
            assert passes(near, far)
            if num_lost(host):
                return
    pytest.fail("nothing was lost")


def num_lost(host: Host) -> int:
    words = host.command("iptables", "-L", "INPUT", "-vnx")
    rules = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[2:]
    return sum(int(rule.split()[0]) for rule in rules)


def test_killed_connections_are_reset(network: Network) -> None:
    first, second = network.hosts
    with connected(network.here, first) as (near, far), connected(network.here, second) as (other_near, other_far):
        network.kill_connections(first)
        for end in (near, far):
            with pytest.raises((ConnectionAbortedError, ConnectionResetError)):
                end.recv(1)
        assert passes(other_near, other_far)


def test_nothing_is_left_even_after_a_failure() -> None:
    def fail_inside() -> None:
        with Network(1) as network:
            name = network.hosts[0].namespace
            assert name is not None
            assert name in listing()
            names.append(name.rpartition("h")[0])
            raise KeyError

    names: list[str] = []
    with pytest.raises(KeyError):
        fail_inside()
    assert names[0] not in listing()


def test_network_that_cannot_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Network, "_end_of", lambda self, host: "longer-than-names-may-be")
    before = listing().count(f"dt{os.getpid()}")
    with pytest.raises(OSError, match="longer-than-names-may-be"):
        Network(1)
    assert listing().count(f"dt{os.getpid()}") == before


def test_network_of_a_killed_process_is_removed_by_the_next() -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    names = [f"dt{gone.pid}n0h1", f"dt{gone.pid}n0s"]
    for name in names:
        subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", names[1], "link", "add", f"dt{gone.pid}n0p0", "type", "bridge"], check=True)
    remove_stale()
    assert f"dt{gone.pid}n0" not in listing()


def test_process_on_a_removed_host_loses_its_cable_at_once() -> None:
    with Network(1) as network, connected(network.here, network.hosts[0]) as (near, far):
        network.close()
        began_s = time.monotonic()
        assert not passes(far, near, limit_s=HELD_S)
        assert time.monotonic() - began_s < LIMIT_S
    assert network.here.port not in listing()
