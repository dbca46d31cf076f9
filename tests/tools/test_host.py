"""`danaus host`: what it prints and writes, what it refuses."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from danaus.runtime.network.keys import create_key_file, format_key, read_key_file
from danaus.tools import host as host_command

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LIMIT_S = 10.0


@pytest.fixture
def key(tmp_path: Path) -> Path:
    create_key_file(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=LIMIT_S)


def start(started: list[subprocess.Popen[str]], *arguments: object, text: str | None = None) -> str:
    """Start a host and return its first line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "danaus.tools.host", *map(str, arguments)],
        stdin=subprocess.PIPE if text is not None else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    started.append(process)
    if process.stdin is not None:
        process.stdin.write(text or "")
        process.stdin.close()
        process.stdin = None
    assert process.stdout is not None
    return process.stdout.readline()


def test_it_says_where_it_listens_on_loopback_by_default(key: Path, started: list[subprocess.Popen[str]]) -> None:
    line = start(started, "--key", key, "--name", "nest")

    assert re.fullmatch(r"danaus host: nest listens on tcp://127\.0\.0\.1:\d+\n", line)


def test_the_ready_file_says_the_same_and_is_its_owners(
    key: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    ready = tmp_path / "ready"
    ready.write_text("stale", encoding="utf-8")

    line = start(started, "--key", key, "--ready-file", ready)

    # Written before the line is printed.
    assert ready.read_text(encoding="utf-8") == line.rpartition(" ")[2]
    assert stat.S_IMODE(ready.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "ready"]


def test_others_are_told_the_advertised_host(key: Path, started: list[subprocess.Popen[str]]) -> None:
    line = start(started, "--key", key, "--listen", "tcp://*:0", "--advertise", "node7.example")

    assert re.search(r" listens on tcp://node7\.example:\d+\n", line)


def test_on_every_interface_it_is_reached_by_the_machines_name(key: Path, started: list[subprocess.Popen[str]]) -> None:
    line = start(started, "--key", key, "--listen", "tcp://0.0.0.0:0")

    assert f" listens on tcp://{os.uname().nodename}:" in line


def test_the_key_can_come_by_standard_input(key: Path, started: list[subprocess.Popen[str]]) -> None:
    line = start(started, "--key", "-", text=key.read_text(encoding="ascii"))

    assert " listens on tcp://127.0.0.1:" in line


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 0)])
def test_its_exit_code_tells_a_scheduler_that_it_was_terminated(
    key: Path, started: list[subprocess.Popen[str]], signum: int, code: int
) -> None:
    start(started, "--key", key)

    started[0].send_signal(signum)

    assert started[0].wait(LIMIT_S) == code


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://127.0.0.1:0"])
def test_without_a_key_it_refuses_to_listen(capsys: pytest.CaptureFixture[str], address: str) -> None:
    assert host_command.main(["--listen", address]) == 1

    shown = capsys.readouterr()
    assert "`danaus key FILE` and pass --key FILE" in shown.err
    assert shown.out == ""


def test_a_key_that_others_can_read_is_refused_and_not_shown(key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key.chmod(0o644)

    assert host_command.main(["--key", str(key)]) == 1

    shown = capsys.readouterr()
    assert "chmod 600" in shown.err
    key.chmod(0o600)
    assert format_key(read_key_file(key)).decode().strip() not in shown.err


def test_the_key_itself_is_no_file_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert host_command.main(["--key", "no-such-file"]) == 1

    assert "danaus key FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--listen", "0.0.0.0"], "expected tcp://HOST:PORT"),
        (["--listen", "ipc:///tmp/x"], "expected tcp://HOST:PORT"),
        (["--listen", "tcp://no-such-host.invalid:0"], "cannot be found"),
        (["--listen", "tcp://192.0.2.1:0"], "assign requested address"),
    ],
)
def test_what_keeps_it_from_starting_is_said(
    key: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert host_command.main(["--key", str(key), *arguments]) == 1

    shown = capsys.readouterr()
    assert reason in shown.err
    assert shown.err.startswith("danaus host: ")
    assert shown.err.count("\n") == 1


def test_two_daemons_on_one_port_are_one_too_many(
    key: Path, started: list[subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    address = start(started, "--key", key).split()[-1]

    assert host_command.main(["--key", str(key), "--listen", address]) == 1

    assert "in use" in capsys.readouterr().err


def test_a_ready_file_that_cannot_be_written_is_said(key: Path, tmp_path: Path) -> None:
    ready = tmp_path / "no-such-directory" / "ready"

    ended = subprocess.run(
        [sys.executable, "-m", "danaus.tools.host", "--key", str(key), "--ready-file", str(ready)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )

    assert ended.returncode == 1
    assert "No such file" in ended.stderr
    assert ended.stdout == ""


def test_it_ends_with_the_process_that_it_follows(key: Path, started: list[subprocess.Popen[str]]) -> None:
    followed = subprocess.Popen(["sleep", "30"])
    try:
        start(started, "--key", key, "--follow", followed.pid)
        assert started[0].poll() is None
    finally:
        followed.kill()
        followed.wait()

    assert started[0].wait(LIMIT_S) == 0


def test_it_does_not_start_where_who_it_follows_is_gone(key: Path, started: list[subprocess.Popen[str]]) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()

    assert start(started, "--key", key, "--follow", gone.pid) == ""
    assert started[0].wait(LIMIT_S) == 0
