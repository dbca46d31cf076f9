"""Hosts on this machine, with real daemons: found by other scripts, ended with their own, replaced when they die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from danaus.runtime.jobs import JobError, LaunchError, launch, load_job
from danaus.runtime.jobs.local_job import LocalJob
from danaus.runtime.jobs.processes import Known, end_all, known

from .scripts import eventually, spawn_places, where

pytestmark = pytest.mark.timeout(60)

SCRIPT = """
import sys, time
from danaus.runtime.jobs.local_job import LocalJob
job = LocalJob(hosts=2, name="a", detached={detached})
job.apply()
job._wait_listening(20, time.monotonic() + 20)
print(*(notes["pid"] for notes in job._record().launched["hosts"]), flush=True)
{then}
"""


def listening(job: Any) -> list[str]:
    return job._wait_listening(20.0, time.monotonic() + 20.0)[1]


def daemons(job: Any) -> list[Known]:
    return [Known(notes["pid"], notes["start_ticks"]) for notes in job._record().launched["hosts"]]


def wait_ended(processes: list[Known], limit_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while any(process.is_alive() for process in processes):
        assert time.monotonic() < deadline_s, processes
        time.sleep(0.02)


def start_script(*, detached: bool, then: str) -> tuple[subprocess.Popen[str], list[Known]]:
    code = SCRIPT.format(detached=detached, then=then)
    script = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert script.stdout is not None
    return script, [known(int(pid)) for pid in script.stdout.readline().split()]


def close(script: subprocess.Popen[str]) -> None:
    assert script.stdin is not None
    assert script.stdout is not None
    script.stdin.close()
    script.stdout.close()
    script.wait(20)


def test_a_job_is_one_mesh_of_hosts_that_runs_actors_and_ends_with_its_block() -> None:
    with LocalJob(hosts=2) as job:
        hosts = job.hosts()
        assert hosts.sizes == {"hosts": 2}
        assert job.hosts() is hosts
        places = where(spawn_places(hosts))
        processes = daemons(job)
        assert len({agent for _, agent, _ in places}) == 2
        assert [host.status for host in job.state().hosts] == ["running", "running"]

    assert not any(process.is_alive() for process in processes)
    assert job.state().status == "ended"


def test_a_killed_daemon_is_replaced_and_its_ranks_come_back() -> None:
    with LocalJob(hosts=2, replace_lost=1) as job:
        places = spawn_places(job.hosts())
        before = where(places)
        os.kill(daemons(job)[1].pid, signal.SIGKILL)

        after = eventually(lambda: (now := where(places))[1][0] != before[1][0] and now)

        assert after[0] == before[0]
        assert after[1][1:] != before[1][1:]
        assert job._record().replaced == 1
        assert all(process.is_alive() for process in daemons(job))


def test_the_other_hosts_are_reached_through_one_of_them_where_that_is_asked_for() -> None:
    with LocalJob(hosts=3) as job:
        assert len({agent for _, agent, _ in where(spawn_places(job.hosts(gateway=1)))}) == 3


def test_a_detached_job_outlives_its_script_and_another_one_attaches_to_it() -> None:
    script, processes = start_script(detached=True, then="")
    close(script)
    assert script.returncode == 0
    with LocalJob(hosts=2, name="a", detached=True) as job:
        assert all(process.is_alive() for process in processes)
        assert daemons(job) == processes
        assert len(where(spawn_places(job.hosts()))) == 2

    assert not any(process.is_alive() for process in processes)


def test_hosts_end_with_a_script_that_returns() -> None:
    script, processes = start_script(detached=False, then="")
    close(script)

    wait_ended(processes)
    with pytest.raises(JobError, match="no job 'a'"):
        load_job("a")


def test_hosts_end_with_a_script_that_is_killed() -> None:
    script, processes = start_script(detached=False, then="sys.stdin.read()")
    script.kill()
    close(script)

    wait_ended(processes)
    job = LocalJob(hosts=2, name="a")
    assert job.state().status == "ended"
    job.kill()


def test_a_second_script_ends_a_job_by_its_name() -> None:
    job = LocalJob(hosts=2, name="a")
    job.apply()
    processes = daemons(job)
    load_job("a").kill()

    assert not any(process.is_alive() for process in processes)
    assert job.state().status == "ended"


def test_a_daemon_that_does_not_start_is_shown_with_its_code_and_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "HOST_MODULE", "danaus.no_such_module")
    with LocalJob(hosts=2) as job, pytest.raises(LaunchError) as caught:
        job.hosts()

    text = str(caught.value)
    assert "(local-" in text
    assert "): it ended with code 1" in text
    assert "No module named danaus.no_such_module" in text


def test_the_daemons_output_is_there_to_read_and_the_command_to_see() -> None:
    with LocalJob(hosts=2, name="a") as job:
        job.apply()
        address = listening(job)[1]
        assert f"a-1 listens on {address}" in job.logs(1)
        secret = Path(job.key_file()).read_text(encoding="utf-8").strip()
        commands = [Path(f"/proc/{process.pid}/cmdline").read_text(encoding="utf-8") for process in daemons(job)]
        environments = [Path(f"/proc/{process.pid}/environ").read_text(encoding="utf-8") for process in daemons(job)]

    assert "--listen tcp://127.0.0.1:0" in job.render()
    assert len(job.render().splitlines()) == 2
    assert not any(secret in text for text in [*commands, *environments, job.render()])


def test_a_process_that_ignores_sigterm_is_killed_and_one_that_has_gone_is_no_error() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as stubborn:
        assert stubborn.stdout is not None
        stubborn.stdout.readline()
        process = known(stubborn.pid)

        assert end_all([process, Known(stubborn.pid, 1)], grace_s=0.1) == []
        assert stubborn.wait(5) == -signal.SIGKILL
    assert end_all([process], grace_s=0.1) == []


def test_a_number_of_hosts_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="hosts=0"):
        LocalJob(hosts=0)
