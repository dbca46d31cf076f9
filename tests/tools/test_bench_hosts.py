"""The benchmark's measures of several hosts: what they count with is right, and each yields its rows."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danaus.tools.bench import cut, cuttable, hosts, session
from danaus.tools.bench.counted import counted
from danaus.tools.bench.cuttable import Cuttable, wait_port
from danaus.tools.bench.host_actors import send_numbers
from danaus.tools.bench.lab import QUICK, Lab
from danaus.tools.bench.ours import Danaus
from danaus.tools.bench.rows import Goal, Row, judge
from danaus.tools.bench.traffic import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT_S = 10.0
FAR = "127.0.0.2"

# what became of messages:


@pytest.mark.parametrize(
    ("came", "expected"),
    [
        ([0, 1, 2, 3], Tally(4, 0, 0, 0)),
        ([], Tally(4, 4, 0, 0)),
        ([0, 1, 3], Tally(4, 1, 0, 0)),
        ([0, 1, 1, 2, 3], Tally(4, 0, 1, 0)),
        ([0, 2, 1, 3], Tally(4, 0, 0, 1)),
        ([3, 0, 1, 2], Tally(4, 0, 0, 3)),
        # Sent again, and come again: doubled, and not overtaken.
        ([0, 1, 2, 0, 1, 2, 3], Tally(4, 0, 3, 0)),
        ([1, 0, 0], Tally(4, 2, 1, 1)),
    ],
)
def test_messages_are_lost_doubled_or_overtaken_each_for_itself(came: list[int], expected: Tally) -> None:
    assert Tally.of({7: 4}, {7: came}) == expected


def test_senders_have_no_order_among_them_and_are_counted_together() -> None:
    tally = Tally.of({0: 2, 1: 3}, {1: [0, 1, 2], 0: [1, 0]})

    assert tally == Tally(5, 0, 0, 1)
    assert tally + Tally.of({0: 2}, {}) == Tally(7, 2, 0, 1)
    assert (tally + Tally.of({0: 2}, {})).wrong == 3


@pytest.mark.parametrize("came", [{0: [2]}, {0: [-1]}, {1: [0]}])
def test_what_nobody_has_sent_is_an_error(came: dict[int, list[int]]) -> None:
    with pytest.raises(ValueError, match="came of sender"):
        Tally.of({0: 2}, came)


@given(st.integers(0, 30), st.lists(st.integers(0, 29), max_size=10), st.lists(st.integers(0, 29), max_size=10))
def test_every_loss_and_every_copy_is_counted(count: int, dropped: list[int], copied: list[int]) -> None:
    came: list[int] = []
    for number in range(count):
        if number not in dropped:
            came += [number] * (1 + copied.count(number))

    tally = Tally.of({0: count}, {0: came})

    assert tally.lost == len(set(dropped) & set(range(count)))
    assert tally.doubled == len(came) - len(set(came))
    assert tally.overtaken == 0
    assert Tally.of({0: count}, {0: sorted(came, reverse=True)}).overtaken == max(len(set(came)) - 1, 0)


def test_numbers_are_sent_in_order_to_all() -> None:
    sent: list[tuple[str, int, int]] = []
    targets: list[Any] = [
        SimpleNamespace(
            note=SimpleNamespace(broadcast=lambda sender, number, name=name: sent.append((name, sender, number)))
        )
        for name in "ab"
    ]

    send_numbers(3, targets, 3, rate=1e6)

    assert sent == [(name, 3, number) for number in range(3) for name in "ab"]


# a network that can be cut:


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LIMIT_S)
        yield listener


@pytest.fixture
def network(server: socket.socket) -> Iterator[Cuttable]:
    network = Cuttable(FAR, "127.0.0.1", server.getsockname()[1])
    yield network
    network.close()


def connected(server: socket.socket) -> tuple[socket.socket, socket.socket]:
    near = socket.create_connection((FAR, server.getsockname()[1]), LIMIT_S)
    far = server.accept()[0]
    far.settimeout(LIMIT_S)
    return near, far


def has_nothing(end: socket.socket) -> bool:
    end.settimeout(0.05)
    try:
        return not end.recv(1)
    except TimeoutError:
        return True
    finally:
        end.settimeout(LIMIT_S)


def test_bytes_pass_in_both_directions_and_the_end_of_a_connection_too(
    server: socket.socket, network: Cuttable
) -> None:
    near, far = connected(server)
    with near, far:
        near.sendall(b"there")
        assert far.recv(9) == b"there"
        far.sendall(b"back")
        assert near.recv(9) == b"back"
        near.close()
        assert far.recv(9) == b""
    assert network.num_held == 0


def test_a_cut_holds_what_is_sent_on_old_and_new_connections_until_it_is_healed(
    server: socket.socket, network: Cuttable
) -> None:
    near, far = connected(server)
    with near, far:
        network.cut()
        another, its_far = connected(server)
        with another, its_far:
            near.sendall(b"there")
            far.sendall(b"back")
            another.sendall(b"new")
            assert all(map(has_nothing, (far, near, its_far)))
            assert network.num_held == 3

            network.heal()

            assert (far.recv(9), near.recv(9), its_far.recv(9)) == (b"there", b"back", b"new")


def test_connections_end_with_the_network_even_while_it_is_cut(server: socket.socket) -> None:
    network = Cuttable(FAR, "127.0.0.1", server.getsockname()[1])
    near, far = connected(server)
    with near, far:
        network.cut()
        near.sendall(b"held")

        network.close()

        assert near.recv(9) == b""
    with pytest.raises(OSError, match="refused"):
        connected(server)


def test_who_cannot_be_reached_behind_it_refuses_its_connections_alone(
    server: socket.socket, network: Cuttable
) -> None:
    port = server.getsockname()[1]
    server.close()

    for _ in range(2):
        with socket.create_connection((FAR, port), LIMIT_S) as near:
            assert near.recv(9) == b""


LISTENING = """
import socket, subprocess, sys
inherited = socket.create_server(("127.0.0.1", 0))
subprocess.run([sys.executable, "-c", sys.argv[1]], pass_fds=[inherited.fileno()])
"""
LISTENING_BELOW = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""


def test_the_port_of_a_child_is_its_own_and_not_its_parents() -> None:
    command = [sys.executable, "-c", LISTENING, LISTENING_BELOW]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        found = wait_port(process.pid)

        assert found == int(process.stdout.readline())
        process.stdin.close()


def test_a_child_that_never_listens_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuttable, "LIMIT_S", 0.05)

    with pytest.raises(TimeoutError, match="no child of process"):
        wait_port(os.getpid())


# messages that a process handles:


def test_what_comes_in_and_what_goes_out_is_counted_and_handled_as_before() -> None:
    handled: list[Any] = []

    class Local:
        gate: Any

        def _on_frame(self, frame: bytes) -> None:
            handled.append(frame)

    class Gate:
        def send_locked(self, meta: bytes, frames: Any) -> None:
            handled.append((meta, frames))

    local: Any = Local()
    local.gate = Gate()
    with counted(local) as count:
        local._on_frame(b"in")
        local.gate.send_locked(b"meta", [b"out"])
        local._on_frame(b"in, too")
    local._on_frame(b"not counted")
    local.gate.send_locked(b"meta", [])

    assert (count.received, count.sent) == (2, 1)
    assert handled == [b"in", (b"meta", [b"out"]), b"in, too", b"not counted", (b"meta", [])]


# the measures:


def test_the_growth_is_measured_to_64_hosts_and_judged_against_the_fan_out() -> None:
    rows = {row.name: row for measure in hosts.MEASURES for row in measure.rows}

    for number in (1, 4, 16, 64):
        assert rows[f"hosts-messages-{number}"].goal == Goal(times=2.0)
    assert rows["hosts-up"].goal == Goal(at_most=30)
    assert rows["host-round-trip-free"].goal == Goal(times=5.0)
    assert [measure.name for measure in hosts.MEASURES if measure.only_large] == ["hosts-64"]


def test_these_measures_are_run_with_the_others() -> None:
    names = [measure.name for measure in session.MEASURES]

    assert {"host-round-trip", "hosts-1", "hosts-64", "cut"} <= set(names)
    assert len(set(names)) == len(names)


@pytest.fixture
def lab() -> Lab:
    return Lab(Danaus(), replace(QUICK, rounds=1, calls=10), say=lambda _: None)


def run(lab: Lab, make: Callable[[], Any]) -> dict[str, Any]:
    measure = make()
    session.run_measure(lab, measure)
    results = {row.name: lab.results[row.name] for row in measure.rows}
    assert not [each.error for each in results.values() if each.error]
    return results


@pytest.mark.timeout(90)
def test_a_call_to_another_host_is_measured_beside_raw_tcp(lab: Lab) -> None:
    results = run(lab, hosts._round_trip)

    for result in results.values():
        assert result.samples
        assert min(result.limit) < min(result.beside["ZeroMQ through two relays"])


@pytest.mark.timeout(90)
def test_the_controllers_messages_of_a_call_on_hosts_are_counted(lab: Lab) -> None:
    results = run(lab, lambda: hosts._growth(2))

    messages = results["hosts-messages-2"]
    assert set(messages.beside["sent"]) == {1.0}
    assert min(messages.beside["received"]) >= 1
    assert list(messages.limit) == [8.0]
    assert results["hosts-call-2"].samples


@pytest.mark.timeout(90)
def test_a_cut_under_load_is_measured(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "_CUT_S", 0.5)
    monkeypatch.setattr(cut, "_BESIDE_S", 0.3)

    results = run(lab, cut._cut)

    assert list(results["cut-wrong"].samples) == [0.0]
    assert results["cut-wrong"].beside["sent"] == [4 * 1100.0]
    assert results["cut-late"].samples


def test_a_count_is_shown_as_it_is(lab: Lab) -> None:
    row = Row(name="r", title="r", unit="messages", goal=Goal(at_most=0))
    lab.record(row, [3])

    judgement = judge(row, lab.results["r"])

    assert judgement.p50 == 3
    assert judgement.why.endswith("at most 0 wanted")
