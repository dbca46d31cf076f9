"""KubernetesJob, with a program that stands for kubectl, and with the real one and a server that stands for a cluster.

No real cluster was at hand: what a real API server and kubelet make of it is tested by the schemas alone.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import danaus
from danaus.runtime.jobs import JobError, JobSpecError, JobTimeoutError, LaunchError, load_job
from danaus.runtime.jobs.kubernetes_job import KubernetesJob

from . import fake_api, fake_kubectl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT_S = 60.0


class FakeCluster:
    """What the test's kubectl keeps of its cluster."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.settings = {"subnet": "127.26.6", **settings}
        self.set()

    def set(self, **settings: Any) -> None:
        self.settings |= settings
        (self.folder / "settings.json").write_text(json.dumps(self.settings), encoding="utf-8")

    def items(self, kind: str) -> list[dict[str, Any]]:
        path = self.folder / "cluster.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        return [item for item in found if item["kind"] == kind]

    def calls(self) -> list[dict[str, Any]]:
        path = self.folder / "calls.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def change_pod(self, index: int, change: Callable[[dict[str, Any]], object]) -> None:
        """Have something happen to the newest pod of an index."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kept = fake_kubectl.Cluster(self.folder)
            pods = [i for i in kept.find("Pod") if i["metadata"]["annotations"][fake_kubectl.INDEX] == f"{index}"]
            change(pods[-1])
            kept.save()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    """A cluster that ``kubectl`` of the search path talks to."""
    made = make_cluster(tmp_path, monkeypatch)
    programs = tmp_path / "bin"
    programs.mkdir()
    kubectl = programs / "kubectl"
    kubectl.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{fake_kubectl.__file__}" "$@"\n', encoding="utf-8")
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("FAKE_CLUSTER", str(made.folder))
    return made


@pytest.fixture(params=["fake kubectl", "real kubectl"])
def either(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    """The same, and again behind an API server that the real kubectl talks to."""
    if request.param == "fake kubectl":
        yield request.getfixturevalue("cluster")
        return
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl: https://kubernetes.io/docs/tasks/tools/")
    pytest.importorskip("kubernetes_validate", reason="no Kubernetes schemas: pip install kubernetes-validate")
    made = make_cluster(tmp_path, monkeypatch)
    with fake_api.serving(made.folder) as config:
        (tmp_path / "kubeconfig").write_text(config, encoding="utf-8")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        monkeypatch.setenv("HOME", str(tmp_path))
        yield made


def make_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    folder = tmp_path / "cluster"
    folder.mkdir()
    monkeypatch.setenv("DANAUS_STATE_DIR", str(tmp_path / "state"))
    return FakeCluster(folder)


def make_job(**fields: Any) -> KubernetesJob:
    wanted: dict[str, Any] = {"name": "train", "image": "registry.example/danaus:1", "hosts": 2, **fields}
    return KubernetesJob(**wanted)


def test_the_job_runs_until_it_is_killed(either: FakeCluster) -> None:
    job = make_job()
    job.apply()

    assert job.state().status == "running"
    found = load_job("train").state()
    assert [(host.index, host.status) for host in found.hosts] == [(0, "running"), (1, "running")]
    assert [host.address for host in found.hosts] == ["tcp://127.26.6.1:26600", "tcp://127.26.6.2:26600"]
    assert found.hosts[0].name.startswith("train-0-")
    assert "2" in found.detail or "job train" in found.detail
    job.kill()
    assert [either.items(kind) for kind in ("Job", "Service", "Secret", "Pod")] == [[], [], [], []]
    assert job.state().status == "ended"


def test_a_jobset_is_found_and_killed_as_well(either: FakeCluster) -> None:
    with make_job(jobset=True) as job:
        job.apply()

        assert either.items("Service") == []
        assert job.state().status == "running"
        assert job.state().hosts[1].name.startswith("train-hosts-0-1-")
    assert [either.items(kind) for kind in ("JobSet", "Job", "Secret", "Pod")] == [[], [], [], []]


def test_the_key_goes_to_kubectl_by_its_input_only(cluster: FakeCluster) -> None:
    with make_job() as job:
        job.apply()
        key = Path(job.key_file()).read_text(encoding="utf-8")
        encoded = base64.b64encode(key.encode()).decode()
        job.state()

    calls = cluster.calls()
    assert encoded in calls[0]["stdin"]
    assert [call for call in calls if key.strip() in json.dumps(call) or encoded in json.dumps(call["arguments"])] == []
    assert [call for call in calls if encoded in json.dumps(call["env"])] == []


def test_a_pod_that_fails_is_pending_until_its_successor_is_ready(either: FakeCluster) -> None:
    with make_job(replace_lost=1) as job:
        job.apply()
        before = job.state().hosts
        either.change_pod(1, lambda pod: fake_kubectl.fail(pod, 137))

        # The fake's controllers act at the next look, and Kubernetes' own some time later.
        seen = {host.name: host for state in (job.state(), job.state()) for host in state.hosts if host.index == 1}
        after = job.state().hosts
        either.change_pod(1, lambda pod: fake_kubectl.fail(pod, 1))
        job.state()
        last = job.state().hosts[1]

    assert after[0] == before[0]
    assert after[1].status == "running"
    assert after[1].address not in {"", before[1].address}
    assert len(seen) >= 1
    assert (last.status, last.detail) == ("ended", "exit code 1: Error")


def test_a_replacement_deletes_the_pod_that_kubernetes_thinks_well(either: FakeCluster) -> None:
    with make_job(replace_lost=1) as job:
        job.apply()
        before = job.state().hosts[1]
        job._put_another(1, before.address)
        after, _ = job._wait_listening(LIMIT_S, time.monotonic() + LIMIT_S, only=1)

        assert after.replaced == 1
        assert job.state().hosts[1].address != before.address
        assert job.state().hosts[0].status == "running"


def test_what_kubernetes_gives_up_cannot_be_replaced(cluster: FakeCluster) -> None:
    with make_job() as job:
        job.apply()
        record = job._record()
        cluster.change_pod(1, lambda pod: fake_kubectl.fail(pod, 137))
        job.state()

        with pytest.raises(LaunchError, match=r"(?s)exit code 137: Error; Kubernetes starts no other.*replace_lost="):
            job._replace(record, 1)


def test_a_wait_that_is_in_vain_says_what_the_scheduler_says(cluster: FakeCluster) -> None:
    cluster.set(unschedulable=["1"])
    with make_job() as job:
        job.apply()

        with pytest.raises(JobTimeoutError, match=r"Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia"):
            job._wait_listening(0.0, time.monotonic())


def test_a_job_of_that_name_that_others_started_is_left_alone(either: FakeCluster, tmp_path: Path) -> None:
    make_job().apply()
    # As on another machine, where nothing is known of it.
    shutil.rmtree(tmp_path / "state")

    with pytest.raises(LaunchError, match=r"(?s)already exists.*choose another name="):
        make_job().apply()
    assert len(either.items("Job")) == len(either.items("Secret")) == 1


def test_a_start_that_fails_half_way_leaves_nothing(either: FakeCluster) -> None:
    either.set(jobset=False)

    with pytest.raises(LaunchError, match="no JobSet operator"):
        make_job(jobset=True).apply()
    assert either.items("Secret") == []
    assert make_job(jobset=True).state().detail == "not started"


def test_another_spec_under_the_same_name_is_told_apart(cluster: FakeCluster) -> None:
    with make_job() as job:
        job.apply()

        with pytest.raises(JobSpecError, match="hosts: 2 runs, 3 is asked for"):
            make_job(hosts=3).apply()


def test_a_cluster_that_cannot_be_reached_is_an_error_with_the_command(cluster: FakeCluster) -> None:
    with make_job() as job:
        job.apply()
        cluster.set(unreachable=True)

        with pytest.raises(JobError, match=r"(?s)looking at the job failed.*kubectl get .*i/o timeout"):
            job.state()
        cluster.set(unreachable=False)


def test_without_kubectl_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DANAUS_STATE_DIR", str(tmp_path / "state"))

    with pytest.raises(LaunchError, match=r"(?s)install kubectl .*danaus job render"):
        make_job().apply()


class Where(danaus.Actor):
    @danaus.endpoint(idempotent=True)
    def pod_index(self) -> int:
        return int(os.environ["DANAUS_HOST_INDEX"])


def run_pods(cluster: FakeCluster) -> int:
    """Have the containers' commands run as processes of this machine, each on an address of its own; return a port."""
    cluster.set(run=True, subnet="127.26.7")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def signal_pod(cluster: FakeCluster, pod: str, number: signal.Signals) -> None:
    os.kill(int((cluster.folder / "pods" / pod / "pid").read_text(encoding="utf-8")), number)


def wait_for_another_pod(job: KubernetesJob, index: int, old: str) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while job.pod_of(index) in {"", old} or job.state().hosts[index].status != "running":
        assert time.monotonic() < deadline_s, f"in place of {old} there is {job.state().hosts[index]}"


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_command_of_the_pods_makes_hosts_that_can_be_used_and_that_come_back(
    either: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DANAUS_GRACE_S", "1")
    with make_job(port=run_pods(either), replace_lost=2, preempt_s=1) as job:
        job.poll_s = 0.1  # type: ignore[misc]
        hosts = job.hosts(timeout=LIMIT_S)
        assert hosts.sizes == {"hosts": 2}
        assert hosts.names == ["train-0", "train-1"]
        procs = hosts.spawn_procs({"gpus": 2}, restart=danaus.Restart(max_restarts=3))
        where = procs.spawn("where", Where)
        assert list(where.pod_index.call().get(timeout=LIMIT_S)) == [0, 0, 1, 1]

        pod = job.pod_of(1)
        signal_pod(either, pod, signal.SIGKILL)
        wait_for_another_pod(job, 1, pod)
        again = where.pod_index.options(retries=10).call().get(timeout=LIMIT_S)

        assert list(again) == [0, 0, 1, 1]
        procs.stop().get(timeout=LIMIT_S)
    assert [either.items(kind) for kind in ("Job", "Service", "Secret", "Pod")] == [[], [], [], []]


@pytest.mark.timeout(180)
def test_an_evicted_pod_comes_back(either: FakeCluster) -> None:
    with make_job(port=run_pods(either), hosts=1, replace_lost=1) as job:
        job.apply()
        job._wait_listening(LIMIT_S, time.monotonic() + LIMIT_S)
        pod = job.pod_of(0)
        assert "listens on tcp://127.26.7.1:" in job.logs(0)

        # What the kubelet sends; a pod that ends with 0 then would count as complete.
        signal_pod(either, pod, signal.SIGTERM)

        wait_for_another_pod(job, 0, pod)
