"""Hosts by a real sshd on loopback."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from danaus.runtime.jobs import LaunchError, far_host, load_job
from danaus.runtime.jobs.far_host import own_address
from danaus.runtime.jobs.processes import Known
from danaus.runtime.jobs.ssh_job import SSHJob
from danaus.runtime.network.keys import create_key_file

from .scripts import eventually, spawn_places, where

if TYPE_CHECKING:
    from .ssh_server import SSHServer

pytestmark = pytest.mark.timeout(60)


def make_job(sshd: SSHServer, **options: Any) -> SSHJob:
    chosen: dict[str, Any] = {
        "hosts": ["127.0.0.1", "localhost"],
        "port": sshd.port,
        "identity": sshd.identity,
        "options": sshd.options,
        "python": sys.executable,
        **options,
    }
    return SSHJob(**chosen)


def daemons(job: SSHJob) -> list[Known]:
    return [Known(notes["pid"], notes["start_ticks"]) for notes in job._record().launched["hosts"]]


def directories(job: SSHJob) -> list[Path]:
    return [Path(notes["directory"]) for notes in job._record().launched["hosts"]]


def test_hosts_run_actors_and_a_killed_daemon_comes_back(sshd: SSHServer) -> None:
    with make_job(sshd, replace_lost=1) as job:
        places = spawn_places(job.hosts())
        before = where(places)
        os.kill(daemons(job)[1].pid, signal.SIGKILL)

        after = eventually(lambda: (now := where(places))[1][0] != before[1][0] and now)

        assert after[0] == before[0]
        processes = daemons(job)
        assert job._record().launched["hosts"][1]["host"] == "localhost"

    assert not any(process.is_alive() for process in processes)


def test_daemons_outlive_their_connection_and_end_by_name_without_a_trace(sshd: SSHServer) -> None:
    make_job(sshd).apply()
    job = make_job(sshd)
    state = job.state()
    assert [(host.name, host.status) for host in state.hosts] == [("127.0.0.1", "running"), ("localhost", "running")]
    assert all(host.address.startswith("tcp://127.0.0.1:") for host in state.hosts)
    processes, folders = daemons(job), directories(job)
    assert "ssh-1 listens on" in job.logs(1)

    load_job("ssh").kill()

    assert not any(process.is_alive() for process in processes)
    assert not any(folder.exists() for folder in folders)


def test_the_key_is_in_no_file_command_line_or_environment_of_the_hosts(sshd: SSHServer) -> None:
    with make_job(sshd) as job:
        job.apply()
        secret = Path(job.key_file()).read_bytes().strip()
        pids = [process.pid for process in daemons(job)]
        texts = [Path(f"/proc/{pid}/{name}").read_bytes() for pid in pids for name in ("cmdline", "environ")]
        files = [path.read_bytes() for folder in directories(job) for path in folder.iterdir()]
        modes = [folder.stat().st_mode & 0o777 for folder in directories(job)]

    assert len(files) == 4
    assert not any(secret in text for text in [*texts, *files, job.render().encode(), sshd.log.read_bytes()])
    assert modes == [0o700, 0o700]


def test_each_host_that_fails_is_named_with_what_ssh_said_and_none_is_left(sshd: SSHServer) -> None:
    before = set(Path("/tmp").glob("danaus-far-host-*"))

    with pytest.raises(LaunchError) as caught:
        make_job(sshd, hosts=["127.0.0.1", "no-such-host.invalid", "nobody-here@127.0.0.1"]).apply()

    first, second = caught.value.attempts
    assert first.host == "host 1 (no-such-host.invalid)"
    assert (first.code, second.code) == (255, 255)
    assert "no-such-host.invalid" in first.output
    assert "Permission denied" in second.output
    assert "ssh must work here without a password" in str(caught.value)
    assert set(Path("/tmp").glob("danaus-far-host-*")) <= before


def test_a_python_without_danaus_is_told_apart_from_one_that_is_missing(sshd: SSHServer, tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys._base_executable} -I -S "$@"\n')  # type: ignore[attr-defined]
    bare.chmod(0o755)
    with pytest.raises(LaunchError, match="No module named") as caught:
        make_job(sshd, hosts=["127.0.0.1"], python=str(bare)).apply()
    assert "give the path of one" in str(caught.value)

    with pytest.raises(LaunchError, match="exit code 127"):
        make_job(sshd, hosts=["127.0.0.1"], python="/no/such/python").apply()


def test_a_host_that_cannot_be_reached_any_more_is_replaced_by_a_spare(
    sshd: SSHServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "ssh_config"
    config.write_text("Host *\n  HostName 127.0.0.1\n")
    # What `ssh` is for this test: with names of its own.
    wrapper = tmp_path / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {config} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    options: dict[str, Any] = {"hosts": ["one", "two"], "spares": ["gone", "three"], "replace_lost": 1}
    make_job(sshd, **options).apply()
    with make_job(sshd, **options) as job:
        lost, its_directory = daemons(job)[1], directories(job)[1]
        config.write_text("Host two gone\n  HostName no-such-host.invalid\nHost *\n  HostName 127.0.0.1\n")
        os.kill(lost.pid, signal.SIGKILL)

        job._wait_listening(30.0, time.monotonic() + 30.0)

        assert [host.name for host in job.state().hosts] == ["one", "three"]
        assert job._record().launched["spares_used"] == 2
        # Nobody could clean up behind it.
        shutil.rmtree(its_directory)


def test_what_ssh_would_run_can_be_seen(sshd: SSHServer) -> None:
    text = make_job(sshd, user="me", addresses=["10.0.0.1", "10.0.0.2"], listen_port=26600).render()

    first, second = text.splitlines()
    assert "-l me" in first
    assert "--address 10.0.0.1 --port 26600" in first
    assert "-- localhost" in second
    assert second.endswith("< KEY_FILE")


def test_a_host_listens_where_ssh_has_reached_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.9 50000 10.0.0.7 22")
    assert own_address() == "10.0.0.7"
    monkeypatch.delenv("SSH_CONNECTION")
    assert own_address() == "127.0.0.1"


def test_a_daemon_whose_starter_has_lost_its_caller_does_not_stay(tmp_path: Path) -> None:
    create_key_file(tmp_path / "key")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        start = subprocess.Popen(
            [sys.executable, "-m", "danaus.runtime.jobs.far_host", "start"],
            stdin=subprocess.PIPE,
            stdout=writer,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
    finally:
        os.close(writer)
    _, errors = start.communicate((tmp_path / "key").read_bytes(), timeout=30)

    assert start.returncode != 0
    assert b"Broken pipe" in errors
    assert [path.name for path in tmp_path.iterdir() if path.name != "state"] == ["key"]


def test_only_what_was_started_is_removed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no directory that `start` has made"):
        far_host.main(["stop", "--directory", str(tmp_path)])

    assert tmp_path.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hosts": []}, "one host at least"),
        ({"hosts": ["-oProxyCommand=x"]}, "no name of a host"),
        ({"hosts": ["a b"]}, "no name of a host"),
        ({"hosts": ["a"], "options": ["Compression"]}, "no setting of ssh"),
        ({"hosts": ["a", "b"], "addresses": ["10.0.0.1"]}, "1 for 2 hosts"),
    ],
)
def test_specs_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSHJob(**options)


def test_a_text_in_the_place_of_a_list_is_refused() -> None:
    with pytest.raises(TypeError, match=r"hosts=\['node1'\]"):
        SSHJob(hosts="node1")
