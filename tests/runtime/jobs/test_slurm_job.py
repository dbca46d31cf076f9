"""Hosts from a real slurmctld with four slurmd, and what of a SlurmJob needs no Slurm."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from danaus.runtime.jobs import JobError, JobTimeoutError, LaunchError, load_job
from danaus.runtime.jobs.slurm_host import address_of_interface, node_address
from danaus.runtime.jobs.slurm_job import SlurmJob

from .scripts import OFTEN, Counter, eventually, spawn_places, where

if TYPE_CHECKING:
    from .slurm_cluster import SlurmCluster

pytestmark = pytest.mark.timeout(90)


NO_OUTPUT = "--output=/dev/null"


def listening(job: SlurmJob, limit_s: float = 30.0) -> list[str]:
    return job._wait_listening(limit_s, time.monotonic() + limit_s)[1]


def job_ids(job: SlurmJob) -> list[str]:
    return [host.partition(".")[0] for host in job._record().launched["hosts"]]


def cancel_step(slurm: SlurmCluster, name: str) -> None:
    for line in slurm.run("squeue", "--steps", "--noheader", "--format=%i|%j").splitlines():
        step, _, found = line.strip().partition("|")
        if found == name:
            slurm.run("scancel", step)


def test_nodes_run_actors_see_their_gpus_and_a_cancelled_one_is_replaced_by_another(slurm: SlurmCluster) -> None:
    # Slurm kills every process of a cancelled step: nobody is left to remove their sockets.
    setup = [f"export DANAUS_SOCKET_DIR={slurm.directory / 'sockets'}"]
    with SlurmJob(nodes=2, gpus_per_node=2, time=5, setup=setup, replace_lost=1) as job:
        places = spawn_places(job.hosts())
        before = where(places)
        assert list(places.variable.call("SLURMD_NODENAME").get(timeout=20).values()) == ["n1", "n2"]
        agents = [Path(f"/proc/{agent}/environ").read_bytes() for _, agent, _ in before]
        assert all(b"\0CUDA_VISIBLE_DEVICES=0,1\0" in environment for environment in agents)
        cancel_step(slurm, "host-1")

        after = eventually(lambda: (now := where(places))[1][0] != before[1][0] and now, limit_s=40.0)

        assert after[0] == before[0]
        assert list(places.variable.call("SLURMD_NODENAME").get(timeout=20).values()) == ["n1", "n3"]
        first, second = job.state().hosts
        assert (first.status, second.status) == ("running", "running")
        assert first.name.startswith("n1, Slurm job ")
        assert second.name.startswith("n3, Slurm job ")
        first_job, second_job = job_ids(job)
        assert first_job != second_job
        # What is left of the first job's five minutes.
        limit = slurm.run("squeue", "--noheader", f"--jobs={second_job}", "--format=%l").strip()
        assert limit.startswith("4:") or limit == "5:00"

    assert slurm.run("squeue", "--noheader") == ""


def test_a_job_outlives_its_script_and_is_found_and_ended_by_name(slurm: SlurmCluster, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    SlurmJob(nodes=2, directory=str(shared), share_node=True, sbatch_args=["--cpus-per-task=1"]).apply()
    job = SlurmJob(nodes=2, directory=str(shared), share_node=True, sbatch_args=["--cpus-per-task=1"])
    assert len(listening(job)) == 2
    key = Path(job.key_file())
    assert key.is_relative_to(shared)
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.parent.stat().st_mode & 0o777 == 0o700
    secret = key.read_text(encoding="utf-8").strip()
    others = [path for path in key.parent.iterdir() if path != key]
    assert not any(secret in path.read_text(encoding="utf-8") for path in others)
    assert secret not in slurm.run("scontrol", "show", "job")
    assert secret not in slurm.run("scontrol", "write", "batch_script", job_ids(job)[0], "-")
    assert "n1 listens on tcp://127.0.0.1:" in job.logs(0)

    load_job("slurm").kill()

    assert job.state().status == "ended"
    assert not key.exists()
    assert slurm.run("squeue", "--noheader") == ""


def test_actors_of_a_preempted_job_drain_and_go_on_on_another_node(slurm: SlurmCluster) -> None:
    with SlurmJob(nodes=1, partition="main", time=5, replace_lost=1) as job:
        counter: Any = job.hosts().spawn_procs(restart=OFTEN, gpus="none").spawn("counter", Counter)
        assert [counter.add.call_one().get(timeout=20) for _ in range(3)] == [1, 2, 3]
        (first,) = job_ids(job)
        slurm.run("sbatch", "--partition=urgent", "--nodelist=n1", "--exclusive", NO_OUTPUT, "--wrap=sleep 60")

        eventually(lambda: counter.variable.options(timeout=20).call_one("SLURMD_NODENAME").get() == "n2", limit_s=40.0)
        assert counter.add.call_one().get(timeout=20) == 4

        assert [host.status for host in job.state().hosts] == ["running"]
        assert "ending by SIGTERM" in Path(job.key_file()).with_name(f"host-{first}.0.log").read_text(encoding="utf-8")
        eventually(lambda: "JobState=PREEMPTED" in slurm.run("scontrol", "show", "job", first))


def test_a_preempted_job_without_replacement_has_ended_and_says_why(slurm: SlurmCluster) -> None:
    with SlurmJob(nodes=4, partition="main") as job:
        job.apply()
        listening(job)
        slurm.run("sbatch", "--partition=urgent", "--nodes=1", "--exclusive", NO_OUTPUT, "--wrap=true")

        eventually(lambda: "PREEMPTED" in job.state().detail)

        assert job.state().status == "ended"
        with pytest.raises(LaunchError, match="4 of its hosts failed") as caught:
            listening(job)
        assert "PREEMPTED" in str(caught.value)


def test_a_node_that_is_taken_down_is_replaced_before_anything_attaches(slurm: SlurmCluster) -> None:
    with SlurmJob(nodes=2, share_node=True, sbatch_args=["--cpus-per-task=1"], replace_lost=1) as job:
        job.apply()
        before = listening(job)
        slurm.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
        eventually(lambda: job.state().hosts[1].status == "ended")

        after = listening(job)

        assert after[0] == before[0]
        assert after[1] != before[1]
        assert len(set(job_ids(job))) == 2


def test_a_job_that_waits_in_the_queue_says_why(slurm: SlurmCluster) -> None:
    with SlurmJob(nodes=5) as job:
        job.apply()
        assert job.state().status == "pending"
        with pytest.raises(JobTimeoutError, match=r"5 hosts do not listen after 1 s \(Slurm job \d+: PENDING"):
            listening(job, 1.0)


def test_what_sbatch_refuses_is_shown_with_what_was_run(slurm: SlurmCluster, state_dir: Path) -> None:
    with pytest.raises(LaunchError) as caught:
        SlurmJob(nodes=1, partition="nowhere").apply()

    assert "ran: sbatch --parsable" in str(caught.value)
    assert "invalid partition specified: nowhere" in str(caught.value)
    assert list((state_dir / "jobs").glob("*.json")) == []


def test_a_setup_that_fails_is_shown(slurm: SlurmCluster) -> None:
    with SlurmJob(nodes=1, setup=["echo no module cuda/99 >&2", "exit 3"]) as job:
        job.apply()
        with pytest.raises(LaunchError, match="no module cuda/99") as caught:
            listening(job)

    assert "NonZeroExitCode" in str(caught.value)


def test_a_machine_without_slurm_is_told_what_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(LaunchError, match="no program 'sbatch' is on the search path"):
        SlurmJob(nodes=1).apply()


def test_an_slurm_that_does_not_answer_is_no_ended_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools = {"sbatch": "echo 7", "squeue": "echo Unable to contact slurm controller >&2; exit 1", "scancel": "exit 1"}
    for name, line in tools.items():
        tool = tmp_path / name
        tool.write_text(f"#!/bin/sh\n{line}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    job = SlurmJob(nodes=1)
    job.apply()

    with pytest.raises(JobError, match="Unable to contact slurm controller"):
        job.state()


def test_the_script_has_what_was_asked_for_and_no_key() -> None:
    job = SlurmJob(
        nodes=3,
        partition="gpu",
        time="1-12:00:00",
        gpus_per_node=8,
        account="me",
        sbatch_args=["--qos=high"],
        setup=["module load cuda"],
        python="/venv/bin/python",
        directory="/shared dir",
        interface="ib0",
        name="run-7",
    )

    lines = job.render().splitlines()

    assert lines[0] == "#!/bin/bash"
    for option in (
        *("--job-name=danaus-run-7", "--nodes=3", "--partition=gpu", "--time=1-12:00:00", "--account=me"),
        *("--gpus-per-node=8", "--qos=high", "--exclusive", "--no-requeue", "--no-kill"),
    ):
        assert f"#SBATCH {option}" in lines
    assert "module load cuda" in lines
    assert "directory='/shared dir/danaus-job-run-7'" in lines
    assert "/venv/bin/python -m danaus.runtime.jobs.slurm_host" in job.render()
    assert "--interface ib0" in job.render()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "nodes=0"),
        ({"nodes": 1, "gpus_per_node": -1}, "gpus_per_node=-1"),
        ({"nodes": 1, "time": "soon"}, "time='soon'"),
        ({"nodes": 1, "sbatch_args": ["qos=high"]}, "--option=value"),
        ({"nodes": 1, "sbatch_args": ["--a\nrm"]}, "--option=value"),
    ],
)
def test_specs_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlurmJob(**options)


def test_a_text_in_the_place_of_a_list_is_refused() -> None:
    with pytest.raises(TypeError, match="sbatch_args"):
        SlurmJob(nodes=1, sbatch_args="--qos=high")


@pytest.mark.parametrize(
    ("node_address_in_slurm", "expected"),
    [("10.1.2.3", "10.1.2.3"), ("fd00::7", "fd00::7"), ("node7", "10.1.2.7"), ("debian", "127.0.0.1")],
)
def test_a_node_listens_at_its_address_in_slurm_but_never_at_a_name_of_its_own_for_loopback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, node_address_in_slurm: str, expected: str
) -> None:
    tool = tmp_path / "scontrol"
    tool.write_text(f"#!/bin/sh\necho NodeName=n7 NodeAddr={node_address_in_slurm} NodeHostName=n7\n")
    tool.chmod(0o755)
    names = {"node7": "10.1.2.7", "debian": "127.0.1.1", "10.1.2.3": "10.1.2.3", "fd00::7": "fd00::7"}
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, *_, **__: [(0, 0, 0, "", (names[name], 0))])
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    # The way to the machine that submitted the job starts at this one's own address.
    monkeypatch.setenv("SLURM_SUBMIT_HOST", "127.0.0.1")

    assert node_address("n7") == expected


def test_an_interface_gives_its_address_and_an_unknown_one_lists_those_that_there_are() -> None:
    assert address_of_interface("lo") == "127.0.0.1"
    with pytest.raises(SystemExit, match=r"interface 'ib9' has no IPv4 address .* there are: .*lo"):
        address_of_interface("ib9")
