"""RayJob on a real Ray cluster of several nodes on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import danaus
from danaus.runtime.jobs import JobError, LaunchError, load_job
from danaus.runtime.jobs.ray_job import RayJob, RaySpec, _group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT_S = 60.0
pytestmark = pytest.mark.timeout(3 * LIMIT_S)
STORE_BYTES = 80 << 20
NAME = f"ray{os.getpid()}"
"""Of the job; other runs on this machine have theirs."""
MISSING = "Ray is not installed: pip install 'danaus[ray]'"


class RayCluster:
    """Ray's head and some nodes, each with one CPU, all on this machine."""

    def __init__(self) -> None:
        ray = pytest.importorskip("ray", reason=MISSING)
        from ray.cluster_utils import Cluster

        self.ray = ray
        # Idle workers would come and go between tests.
        settings: dict[str, Any] = {"prestart_worker_first_driver": False, "enable_worker_prestart": False}
        # Nodes that are lost are noticed sooner than after 15 s.
        settings |= {
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 4,
            "health_check_timeout_ms": 3000,
        }
        head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        self._head = {**head, "_system_config": settings}
        self._cluster: Any = Cluster(initialize_head=False)
        self.nodes: list[Any] = []
        self.kept_handler = False

    def start(self, *, nodes: int) -> None:
        self._cluster.add_node(**self._head)
        self.nodes += [self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES) for _ in range(nodes)]
        # Else the first test would be charged with the threads of the connection.
        before = signal.getsignal(signal.SIGTERM)
        RayJob(address=self.address)._connect()
        self.kept_handler = signal.getsignal(signal.SIGTERM) is before

    @property
    def address(self) -> str:
        return self._cluster.address

    def node_ids(self, job: RayJob) -> list[str]:
        """Ids of the nodes that the job's hosts are on."""
        table = self.ray.util.placement_group_table(_group(job._record().launched["group"]))
        return [table["bundles_to_node_id"][index] for index in range(job.spec.hosts)]

    def lose_node(self, node_id: str) -> None:
        [node] = [node for node in self.nodes if node.node_id == node_id]
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self.ray.shutdown()
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    # Unix sockets lie in it, whose paths are short.
    directory = tempfile.mkdtemp(prefix="dr-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        # Else Ray leaves things in /tmp/ray, where it also looks for clusters that are not ours.
        patch.setenv("RAY_TMPDIR", directory)
        made, before = RayCluster(), signal.getsignal(signal.SIGTERM)
        try:
            made.start(nodes=3)
            yield made
        finally:
            made.close()
            # Ray takes it for itself.
            signal.signal(signal.SIGTERM, before)
            shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANAUS_STATE_DIR", str(tmp_path / "state"))


def make_job(cluster: RayCluster, **fields: Any) -> RayJob:
    wanted: dict[str, Any] = {"name": NAME, "hosts": 2, "address": cluster.address, **fields}
    return RayJob(**wanted)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {LIMIT_S:g} s: {what}"
        time.sleep(0.05)


def listening(job: RayJob) -> list[str]:
    """Wait until all hosts listen; return their addresses."""
    job._wait_listening(LIMIT_S, time.monotonic() + LIMIT_S)
    return [host.address for host in job.state().hosts]


def daemon_pids() -> list[int]:
    """Daemons of the job on this machine."""
    pattern = f"danaus.tools.host .*--name {NAME}-"
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, check=False)
    return [int(word) for word in found.stdout.split()]


def test_each_host_has_a_node_of_its_own_and_all_end_with_the_job(cluster: RayCluster) -> None:
    with make_job(cluster) as job:
        job.apply()
        addresses = listening(job)

        assert len(set(addresses)) == 2
        found = load_job(NAME).state()
        assert (found.status, found.detail) == ("running", "placement group created")
        assert [host.address for host in found.hosts] == addresses
        assert "listens on" in job.logs(0)
        assert len(set(cluster.node_ids(job))) == 2
        assert len(daemon_pids()) == 2
    wait_until(lambda: not daemon_pids(), "the daemons have ended")
    assert job.state().status == "ended"
    table = cluster.ray.util.placement_group_table()
    assert [entry for entry in table.values() if entry["state"] != "REMOVED"] == []


@pytest.mark.slow
def test_another_script_finds_the_job_and_ends_it(cluster: RayCluster) -> None:
    job = make_job(cluster)
    with job:
        job.apply()
        addresses = listening(job)

        found = [
            danaus_job(*words) for words in (["hosts", NAME], ["logs", NAME, "--daemon", "--host", "1"], ["kill", NAME])
        ]

        assert found[0].splitlines() == addresses
        assert f"{NAME}-1 listens on {addresses[1]}" in found[1]
        assert found[2] == f"job {NAME}: has ended\n"
        assert job.state().status == "ended"
    wait_until(lambda: not daemon_pids(), "the daemons have ended")


def danaus_job(*words: str) -> str:
    command = [sys.executable, "-m", "danaus.tools.job", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout


def test_a_connection_leaves_the_scripts_own_signal_handlers_alone(cluster: RayCluster) -> None:
    assert cluster.kept_handler


def test_the_key_is_in_no_argument_variable_or_file_of_the_daemon(cluster: RayCluster) -> None:
    with make_job(cluster, hosts=1) as job:
        job.apply()
        listening(job)
        key = Path(job.key_file()).read_bytes().strip()

        [pid] = daemon_pids()
        assert key not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert key not in Path(f"/proc/{pid}/environ").read_bytes()
        # What it has open, deleted files too: its output.
        files = [path for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_file()]
        assert files != []
        assert [path for path in files if key in path.read_bytes()] == []
    wait_until(lambda: not daemon_pids(), "the daemon has ended")


def test_a_daemon_that_ends_is_told_with_its_last_words_and_replaced(cluster: RayCluster) -> None:
    with make_job(cluster, hosts=2, replace_lost=1) as job:
        job.apply()
        before = listening(job)
        [pid] = [pid for pid in daemon_pids() if f"--name\0{NAME}-1\0".encode() in _command_line(pid)]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: job.state().hosts[1].status == "ended", "the loss is seen")

        assert job.state().hosts[1].detail.startswith("it ended with code -9")
        job._put_another(1, before[1])
        after = listening(job)
        assert after[0] == before[0]
        assert after[1] != before[1]
    wait_until(lambda: not daemon_pids(), "the daemons have ended")


@pytest.mark.slow
def test_a_lost_node_is_replaced_by_another_of_the_cluster(cluster: RayCluster) -> None:
    with make_job(cluster, hosts=2, replace_lost=1) as job:
        job.apply()
        before = listening(job)
        lost_node = cluster.node_ids(job)[1]
        cluster.lose_node(lost_node)
        wait_until(lambda: job.state().hosts[1].status == "ended", "the loss is seen")

        job._put_another(1, before[1])
        after = listening(job)

        assert after[0] == before[0]
        assert after[1] != before[1]
        assert lost_node not in cluster.node_ids(job)
        assert len(daemon_pids()) == 2
    wait_until(lambda: not daemon_pids(), "the daemons have ended")


def test_what_the_cluster_does_not_have_is_waited_for_and_told(cluster: RayCluster) -> None:
    with make_job(cluster, hosts=1, resources={"CPU": 64}) as job:
        job.apply()

        state = job.state()
        assert (state.status, state.detail) == ("pending", "placement group pending")
        assert state.hosts[0].detail == "its place is waited for"


class Where(danaus.Actor):
    @danaus.endpoint(idempotent=True)
    def node(self) -> str:
        return os.environ["WHERE"] + str(danaus.current_rank()["hosts"])


@pytest.mark.slow
def test_its_hosts_run_actors_and_come_back_after_a_loss(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANAUS_GRACE_S", "1")
    with make_job(cluster, replace_lost=1, env={"WHERE": "ray"}) as job:
        procs = job.hosts(timeout=LIMIT_S).spawn_procs({"gpus": 2}, restart=danaus.Restart(max_restarts=3))
        where = procs.spawn("where", Where)
        before = list(where.node.call().get(timeout=LIMIT_S))

        [pid] = [pid for pid in daemon_pids() if f"--name\0{NAME}-1\0".encode() in _command_line(pid)]
        old = set(daemon_pids())
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: bool(set(daemon_pids()) - old), "another daemon was started")
        after = list(where.node.options(retries=10).call().get(timeout=LIMIT_S))

        assert before == after == ["ray0", "ray0", "ray1", "ray1"]
        procs.stop().get(timeout=LIMIT_S)
    wait_until(lambda: not daemon_pids(), "the daemons have ended")


def test_a_host_that_cannot_start_says_why(cluster: RayCluster) -> None:
    with make_job(cluster, hosts=1, env={"DANAUS_PREEMPT_S": "soon"}) as job:
        job.apply()

        with pytest.raises(LaunchError, match="DANAUS_PREEMPT_S=soon"):
            listening(job)


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(JobError, match=r"pip install 'danaus\[ray\]'"):
        RayJob().apply()


def test_render_starts_nothing_and_needs_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)

    assert "4 x {'GPU': 8.0}, strategy SPREAD" in RayJob(hosts=4, resources={"GPU": 8}, strategy="SPREAD").render()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hosts": 0}, "1 or more"),
        ({"strategy": "WIDE"}, "one of STRICT_SPREAD, SPREAD"),
        ({"resources": {"CPU": 0}}, "above 0"),
    ],
)
def test_wrong_fields_are_refused_at_once(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RaySpec(**fields)


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
