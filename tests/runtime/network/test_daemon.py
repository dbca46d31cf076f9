"""A daemon in a process of its own, over real sockets; agents are stand-ins that speak its protocol."""

from __future__ import annotations

import base64
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import zmq

from danaus.runtime.network.door import connect
from danaus.runtime.network.keys import derive, format_key, read_key_file

from .daemons import LIMIT_S, SECRET, DaemonProcess, rss_bytes, run_daemon

if TYPE_CHECKING:
    from collections.abc import Iterator

TERMINATED = 128 + signal.SIGTERM


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with run_daemon(tmp_path) as daemon:
        yield daemon


def wait_gone(pid: int) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline_s, f"process {pid} is still there"
        time.sleep(0.01)


def test_it_tells_what_it_is(daemon: DaemonProcess) -> None:
    kind, fields = daemon.call().ask("info")

    assert kind == "info"
    assert fields["host"] == "nest"
    assert fields["address"] == daemon.endpoint
    assert fields["versions"]["python"] == sys.version.split()[0].rstrip("+")
    assert daemon.call().ask("ping") == ["pong"]


def test_an_agent_is_started_told_its_settings_and_ended(daemon: DaemonProcess) -> None:
    caller = daemon.call()

    kind, fields = caller.attach("train-a1", 3, 2, certificate=b"PEM", log_directory="/var/log/x")

    assert kind == "attached"
    assert fields["endpoint"] == "tcp://127.0.0.1:10003"
    assert fields["host"] == "nest"
    assert fields["versions"]["danaus"]
    (record,) = daemon.agents()
    assert record["pid"] == fields["pid"]
    expected = {"job": "train-a1", "slot": 3, "incarnation": 2, "certificate": "PEM"}
    assert expected.items() <= record.items()
    assert record["secret"] == SECRET.decode()
    assert (record["listen"], record["advertise"], record["host"]) == ("127.0.0.1", "127.0.0.1", "nest")
    assert (record["log_root"], record["daemon_pid"]) == ("/var/log/x", daemon.process.pid)

    assert caller.ask("detach", {"job": "train-a1"}) == ["detached", {}]

    assert caller.wait_exited() == {"job": "train-a1", "slot": 3, "incarnation": 2, "code": 0}
    assert daemon.agents()[-1]["signals"] == [signal.SIGINT]
    wait_gone(fields["pid"])


def test_variables_reach_the_agent(daemon: DaemonProcess, tmp_path: Path) -> None:
    other = tmp_path / "other"

    daemon.call().attach("job", env={"STAND_IN_RECORD": str(other)})

    assert other.exists()
    assert not daemon.records.exists()


def test_a_job_that_is_not_there_is_detached_at_once(daemon: DaemonProcess) -> None:
    assert daemon.call().ask("detach", {"job": "none"}) == ["detached", {}]


@pytest.mark.parametrize(("job", "code"), [("dies", 7), ("killed", -9)])
def test_who_attached_is_told_when_the_agent_ends(daemon: DaemonProcess, job: str, code: int) -> None:
    caller = daemon.call()
    _, fields = caller.attach(job)
    if job == "killed":
        os.kill(fields["pid"], signal.SIGKILL)

    assert caller.wait_exited() == {"job": job, "slot": 1, "incarnation": 0, "code": code}
    # The slot is free again.
    assert caller.attach("fine")[0] == "attached"


@pytest.mark.parametrize(
    ("job", "reason"),
    [("crash", r"ended before it was up.*code 3"), ("nonsense", "its agent's answer is malformed")],
)
def test_an_agent_that_does_not_come_up_is_refused_with_the_reason(
    daemon: DaemonProcess, job: str, reason: str
) -> None:
    caller = daemon.call()

    kind, fields = caller.attach(job)

    assert kind == "refused"
    with pytest.raises(ValueError, match=reason):
        _raise(fields["reason"])
    wait_gone(daemon.agents()[0]["pid"])
    assert caller.unasked == []


def _raise(reason: str) -> None:
    raise ValueError(reason)


def test_asking_again_for_an_agent_that_runs_is_answered_again(daemon: DaemonProcess) -> None:
    first, second = daemon.call(), daemon.call()
    reply = first.attach("job")

    assert second.attach("job") == reply

    os.kill(reply[1]["pid"], signal.SIGKILL)
    # It is told to who asked last.
    assert second.wait_exited()["code"] == -signal.SIGKILL
    assert len(daemon.agents()) == 1


def test_a_newer_incarnation_ends_the_older_one_first(daemon: DaemonProcess) -> None:
    caller = daemon.call()
    _, old = caller.attach("job", incarnation=0)

    kind, new = caller.attach("job", incarnation=1)

    assert kind == "attached"
    assert caller.wait_exited()["incarnation"] == 0
    events = [(record["event"], record["pid"]) for record in daemon.agents()]
    assert events == [("start", old["pid"]), ("end", old["pid"]), ("start", new["pid"])]


@pytest.mark.parametrize("change", [{"incarnation": 0}, {"secret": b"K" * 32}])
def test_an_older_incarnation_or_another_secret_is_refused(daemon: DaemonProcess, change: dict[str, Any]) -> None:
    caller = daemon.call()
    caller.attach("job", incarnation=1)

    kind, fields = caller.attach("job", **{"incarnation": 1, **change})

    assert kind == "refused"
    assert "runs incarnation 1 already" in fields["reason"]


def test_a_caller_that_vanishes_ends_no_job(daemon: DaemonProcess) -> None:
    gone = daemon.call()
    _, fields = gone.attach("job")
    gone.socket.close(0)

    assert daemon.call().attach("job") == ["attached", fields]


def test_a_caller_that_comes_back_under_its_name_is_told_what_happens(daemon: DaemonProcess) -> None:
    before = daemon.call(options={zmq.ROUTING_ID: b"controller-1"})
    _, fields = before.attach("job")
    before.socket.close(0)

    after = daemon.call(options={zmq.ROUTING_ID: b"controller-1"})
    assert after.ask("ping") == ["pong"]
    os.kill(fields["pid"], signal.SIGKILL)

    assert after.wait_exited()["job"] == "job"


def test_two_slots_of_a_job_are_two_agents_and_detach_ends_both(daemon: DaemonProcess) -> None:
    caller = daemon.call()
    pids = [caller.attach("job", slot)[1]["pid"] for slot in (1, 2)]

    assert caller.ask("detach", {"job": "job"}) == ["detached", {}]

    assert len(set(pids)) == 2
    assert {caller.wait_exited()["slot"] for _ in pids} == {1, 2}


def test_shutdown_answers_ends_every_agent_and_exits(daemon: DaemonProcess) -> None:
    caller = daemon.call()
    pids = [caller.attach(job)[1]["pid"] for job in ("a", "b")]

    assert caller.ask("shutdown") == ["ended", {}]

    assert daemon.process.wait(LIMIT_S) == 0
    for pid in pids:
        wait_gone(pid)
    assert [r["signals"] for r in daemon.agents() if r["event"] == "end"] == [[signal.SIGINT]] * 2


def test_sigterm_lets_agents_drain_and_a_second_one_is_passed_on(daemon: DaemonProcess) -> None:
    caller = daemon.call()
    _, fields = caller.attach("job")

    daemon.process.send_signal(signal.SIGTERM)

    assert daemon.process.wait(LIMIT_S) == TERMINATED
    wait_gone(fields["pid"])
    assert daemon.agents()[-1]["signals"] == [signal.SIGTERM]


def test_sigint_with_nothing_to_end_exits_at_once(daemon: DaemonProcess) -> None:
    daemon.process.send_signal(signal.SIGINT)

    assert daemon.process.wait(LIMIT_S) == 0


def test_a_daemon_that_ends_refuses_new_jobs(daemon: DaemonProcess) -> None:
    caller = daemon.call()
    _, fields = caller.attach("stubborn")
    daemon.process.send_signal(signal.SIGTERM)
    # Answered in the order sent, by a loop that has seen the signal once it has passed it on.
    deadline_s = time.monotonic() + LIMIT_S
    while (answer := caller.attach("another"))[0] == "attached":
        assert time.monotonic() < deadline_s

    assert answer == ["refused", {"reason": "this daemon is ending"}]
    os.kill(fields["pid"], signal.SIGKILL)
    assert daemon.process.wait(LIMIT_S) == TERMINATED


def test_agents_end_with_a_daemon_that_is_killed(daemon: DaemonProcess) -> None:
    _, fields = daemon.call().attach("job")

    daemon.process.kill()

    wait_gone(fields["pid"])


GARBAGE = [b"", b"\xc1", b"text", b"\x80", b"\x93\xa4ping\x01", b"\x92\xa4ping\xff", b"\x91\xa4ping", b"x" * 65536]


def test_garbage_is_dropped_and_the_daemon_goes_on(daemon: DaemonProcess) -> None:
    caller = daemon.call()

    for message in GARBAGE:
        caller.socket.send(message)
        caller.socket.send_multipart([message, message])
        assert caller.ask("ping") == ["pong"]


def test_garbage_is_counted_in_the_log(daemon: DaemonProcess) -> None:
    caller = daemon.call()
    caller.socket.send(b"\xc1")
    assert caller.ask("ping") == ["pong"]

    daemon.wait_said("1 malformed messages dropped")


def test_a_malformed_request_is_refused_with_its_reason(daemon: DaemonProcess) -> None:
    caller = daemon.call()

    assert caller.ask("attach", {"job": "j", "slot": 1}) == ["refused", {"reason": "missing: incarnation, secret"}]
    assert caller.ask("explode")[0] == "refused"
    kind, fields = caller.attach("job", slot=0)
    assert (kind, fields["reason"]) == ("refused", "slot: expected a whole number from 1 to 65535")
    assert daemon.agents() == []


def shown_by(pid: int) -> bytes:
    return b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))


def test_no_secret_is_in_a_command_line_an_environment_or_the_log(daemon: DaemonProcess) -> None:
    secret = bytes(range(0x41, 0x61))
    certificate = b"-----PRIVATE-----"
    caller = daemon.call()
    _, fields = caller.attach("job", secret=secret, certificate=certificate)
    caller.attach("job-two", secret=secret, slot=-1, certificate=certificate)
    caller.ask("attach", {"job": "job", "slot": 1, "incarnation": "zero", "secret": secret})
    caller.attach("crash", secret=secret)
    caller.socket.send(b"\xc1" + secret)
    assert caller.ask("ping") == ["pong"]

    shown = shown_by(daemon.process.pid) + shown_by(fields["pid"]) + daemon.said().encode()

    key = read_key_file(daemon.key)
    for hidden in (secret, certificate, key, format_key(key).strip()):
        for form in (hidden, hidden.hex().encode(), base64.b64encode(hidden), repr(hidden)[2:-1].encode()):
            assert form not in shown
    assert str(daemon.key).encode() in shown


def test_what_a_killed_agent_leaves_to_the_daemon_is_buried(daemon: DaemonProcess) -> None:
    """As their next parent it has to: else zombies gather for months."""
    caller = daemon.call()
    _, fields = caller.attach("orphans")
    (orphan,) = [record["child"] for record in daemon.agents() if "child" in record]
    os.kill(fields["pid"], signal.SIGKILL)
    caller.wait_exited()

    os.kill(orphan, signal.SIGKILL)

    wait_gone(orphan)


def test_an_agents_directory_and_descendants_go_where_it_was_killed(daemon: DaemonProcess, tmp_path: Path) -> None:
    caller = daemon.call()
    directory = tmp_path / "job-directory"
    directory.mkdir(0o700)
    (directory / "socket").touch()
    _, fields = caller.attach("orphans", env={"STAND_IN_DIRECTORY": str(directory), "DANAUS_JOB": str(directory)})
    (orphan,) = [record["child"] for record in daemon.agents() if "child" in record]

    os.kill(fields["pid"], signal.SIGKILL)

    assert caller.wait_exited()["code"] == -signal.SIGKILL
    wait_gone(orphan)
    assert not directory.exists()


def test_strangers_and_plain_sockets_are_turned_away_by_the_daemon(daemon: DaemonProcess) -> None:
    secret = read_key_file(daemon.key)
    stranger = connect(
        daemon.context,
        zmq.DEALER,
        daemon.endpoint,
        derive(b"s" * 32, "caller", "host"),
        derive(secret, "listener", "host").public,
    )
    plain = daemon.context.socket(zmq.DEALER)
    plain.connect(daemon.endpoint)
    for each in (stranger, plain):
        each.send(b"\x92\xa4ping\x01")

    assert not stranger.poll(400)
    assert not plain.poll(0)
    assert daemon.call().ask("ping") == ["pong"]
    daemon.wait_said("1 callers without the key turned away (last from 127.0.0.1)")
    stranger.close(0)
    plain.close(0)


@pytest.mark.slow
def test_connections_that_come_to_nothing_are_counted_in_the_log(daemon: DaemonProcess) -> None:
    assert daemon.call().ask("ping") == ["pong"]
    host, port = daemon.endpoint.removeprefix("tcp://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)

    daemon.wait_said("3 connections in all that came to nothing")


def test_a_caller_that_never_reads_costs_little(daemon: DaemonProcess) -> None:
    """What it is owed is dropped in the end, and others are served meanwhile."""
    caller, other = daemon.call(options={zmq.RCVHWM: 1}), daemon.call()
    assert other.ask("ping") == ["pong"]
    before_bytes = rss_bytes(daemon.process.pid)

    for number in range(30_000):
        caller.send("info", number)
    assert other.ask("ping") == ["pong"]

    assert rss_bytes(daemon.process.pid) - before_bytes < 24 << 20


REAL = (sys.executable, "-m", "danaus.tools.host")


def test_of_a_real_agent_that_is_killed_nothing_is_left(tmp_path: Path) -> None:
    with run_daemon(tmp_path, command=REAL) as daemon:
        caller = daemon.call()
        kind, fields = caller.attach("real")
        assert kind == "attached", fields
        below = psutil.Process(fields["pid"]).children(recursive=True)
        (directory,) = Path(os.environ["DANAUS_SOCKET_DIR"]).glob("danaus-*")

        os.kill(fields["pid"], signal.SIGKILL)

        assert caller.wait_exited()["code"] == -signal.SIGKILL
        assert not directory.exists()
        for process in below:
            wait_gone(process.pid)
        assert caller.attach("real", incarnation=1)[0] == "attached"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_real_agent_ends_with_its_daemon(tmp_path: Path, signum: int) -> None:
    with run_daemon(tmp_path, command=REAL) as daemon:
        pids = [daemon.call().attach(job)[1]["pid"] for job in ("one", "two")]

        daemon.process.send_signal(signum)

        assert daemon.process.wait(LIMIT_S) == (TERMINATED if signum == signal.SIGTERM else 0)
        for pid in pids:
            wait_gone(pid)
        assert list(Path(os.environ["DANAUS_SOCKET_DIR"]).glob("danaus-*")) == []
