"""What all kinds of jobs share, with hosts that exist in memory only: started once, found again, replaced, ended."""

from __future__ import annotations

import pickle
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from danaus.runtime.jobs import JobError, JobSpecError, JobTimeoutError, LaunchError, kinds, load_job, saved_jobs
from danaus.runtime.jobs.errors import Attempt
from danaus.runtime.jobs.job import Job
from danaus.runtime.jobs.spec import HostRecord, JobSpec
from danaus.runtime.jobs.state import StateFile

if TYPE_CHECKING:
    from danaus.runtime.jobs.state import Record

pytestmark = pytest.mark.timeout(20)


@dataclass(frozen=True, kw_only=True)
class MemorySpec(JobSpec):
    kind: ClassVar[str] = "memory"
    hosts: int = 2
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tags", tuple(self.tags))


class Scheduler:
    """What would be outside of this process: hosts by number, and what became of them."""

    def __init__(self) -> None:
        self.statuses: dict[int, str] = {}
        self.keys: list[bytes] = []
        self.starts_as = "running"
        self.fails: Exception | None = None
        self.ended_jobs = 0

    def start(self, key_file: Path) -> int:
        if self.fails is not None:
            raise self.fails
        self.keys.append(key_file.read_bytes())
        number = len(self.statuses)
        self.statuses[number] = self.starts_as
        return number

    @property
    def running(self) -> list[int]:
        return [number for number, status in self.statuses.items() if status != "ended"]


SCHEDULER = Scheduler()


class MemoryJob(Job[MemorySpec]):
    poll_s: ClassVar[float] = 0.01

    def __init__(self, *, hosts: int = 2, tags: Any = (), name: str = "", replace_lost: int = 0) -> None:
        super().__init__(MemorySpec(name=name, replace_lost=replace_lost, hosts=hosts, tags=tags))

    def render(self) -> str:
        return f"{self.spec.hosts} hosts"

    def logs(self, host: int, *, lines: int = 200) -> str:
        return ""

    def _launch(self, directory: Path, key_file: Path) -> dict[str, Any]:
        assert list(directory.iterdir()) == [key_file]
        return {"hosts": [SCHEDULER.start(key_file) for _ in range(self.spec.hosts)]}

    def _observe(self, record: Record) -> tuple[list[HostRecord], str]:
        hosts = []
        for index, number in enumerate(record.launched["hosts"]):
            status: Any = SCHEDULER.statuses[number]
            address = f"tcp://127.0.0.1:{4000 + number}" if status == "running" else ""
            hosts.append(HostRecord(index, f"m{number}", address, status, "out of memory" if status == "ended" else ""))
        return hosts, "the queue is long"

    def _replace(self, record: Record, index: int) -> dict[str, Any]:
        hosts = list(record.launched["hosts"])
        SCHEDULER.statuses[hosts[index]] = "ended"
        hosts[index] = SCHEDULER.start(Path(record.key_file))
        return {"hosts": hosts}

    def _end(self, record: Record) -> None:
        SCHEDULER.ended_jobs += 1
        for number in record.launched["hosts"]:
            SCHEDULER.statuses[number] = "ended"


@pytest.fixture(autouse=True)
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    SCHEDULER.__init__()
    monkeypatch.setattr(kinds, "class_of", lambda kind: MemoryJob)
    return SCHEDULER


def listening(job: Job[Any], limit_s: float = 5.0) -> list[str]:
    """Wait as `hosts` does before it attaches, and return the addresses."""
    import time

    return job._wait_listening(limit_s, time.monotonic() + limit_s)[1]


def test_a_job_that_runs_is_found_and_not_started_again(scheduler: Scheduler) -> None:
    MemoryJob(name="a").apply()
    second = MemoryJob(name="a")
    second.apply()

    assert len(scheduler.statuses) == 2
    assert second.state().status == "running"
    assert listening(second) == ["tcp://127.0.0.1:4000", "tcp://127.0.0.1:4001"]


def test_scripts_that_start_a_job_at_once_start_it_once(scheduler: Scheduler) -> None:
    barrier = threading.Barrier(4)

    def apply(_: int) -> None:
        barrier.wait(5)
        MemoryJob(name="a").apply()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(apply, range(4)))

    assert len(scheduler.statuses) == 2


def test_another_job_under_the_same_name_is_refused_with_what_differs_and_how_to_choose(scheduler: Scheduler) -> None:
    MemoryJob(name="a", hosts=2).apply()

    with pytest.raises(JobSpecError) as caught:
        MemoryJob(name="a", hosts=3, tags=["x"]).apply()

    text = str(caught.value)
    assert "hosts: 2 runs, 3 is asked for" in text
    assert "tags: [] runs, ['x'] is asked for" in text
    assert "name=" in text
    assert "danaus job kill a" in text
    assert len(scheduler.running) == 2


def test_scripts_may_differ_in_how_often_hosts_are_replaced(scheduler: Scheduler) -> None:
    MemoryJob(name="a", tags=["x"]).apply()
    MemoryJob(name="a", tags=("x",), replace_lost=4).apply()

    assert len(scheduler.statuses) == 2


def test_a_job_that_has_ended_is_started_anew_whatever_it_was(scheduler: Scheduler) -> None:
    MemoryJob(name="a", hosts=1).apply()
    scheduler.statuses[0] = "ended"
    job = MemoryJob(name="a", hosts=2)
    job.apply()

    assert scheduler.ended_jobs == 1
    assert listening(job) == ["tcp://127.0.0.1:4001", "tcp://127.0.0.1:4002"]
    assert scheduler.keys[0] != scheduler.keys[1]


def test_a_start_that_fails_leaves_no_trace(scheduler: Scheduler, state_dir: Path) -> None:
    scheduler.fails = LaunchError("a", (Attempt("m0", "start m0", 3, "no such thing"),))

    with pytest.raises(LaunchError, match="exit code 3"):
        MemoryJob(name="a").apply()

    assert saved_jobs() == []
    assert not (state_dir / "jobs" / "a").exists()
    assert MemoryJob(name="a").state().detail == "not started"


def test_only_the_owner_can_read_what_is_kept_of_a_job(scheduler: Scheduler, state_dir: Path) -> None:
    MemoryJob(name="a").apply()
    job = load_job("a")

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (state_dir / "jobs").rglob("*")}
    assert (modes["a"], modes["a.json"], modes["key"]) == (0o700, 0o600, 0o600)
    assert stat.S_IMODE((state_dir / "jobs").stat().st_mode) == 0o700
    assert Path(job.key_file()).read_bytes().strip() not in (state_dir / "jobs" / "a.json").read_bytes()


def test_a_folder_that_others_may_enter_is_refused(state_dir: Path) -> None:
    (state_dir / "jobs").mkdir(parents=True, mode=0o755)
    (state_dir / "jobs").chmod(0o755)

    with pytest.raises(JobError, match="chmod 700"):
        MemoryJob(name="a").apply()


def test_a_record_that_cannot_be_read_names_its_file(state_dir: Path) -> None:
    MemoryJob(name="a").apply()
    path = StateFile("a").path
    path.write_text('{"format": 99}')

    with pytest.raises(JobError, match=str(path)):
        MemoryJob(name="a").state()


def test_hosts_that_do_not_come_up_in_time_are_named_and_the_job_goes_on(scheduler: Scheduler) -> None:
    scheduler.starts_as = "pending"
    job = MemoryJob(name="a")
    job.apply()

    with pytest.raises(JobTimeoutError) as caught:
        listening(job, 0.05)

    assert "2 hosts do not listen after 0.05 s (the queue is long): host 0 (m0, pending)" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert job.state().status == "pending"
    scheduler.statuses |= {0: "running", 1: "running"}
    assert len(listening(job)) == 2


def test_a_host_that_ended_is_an_error_that_shows_why(scheduler: Scheduler) -> None:
    job = MemoryJob(name="a")
    job.apply()
    scheduler.statuses[1] = "ended"

    with pytest.raises(LaunchError) as caught:
        listening(job)

    assert "host 1 (m1): out of memory" in str(caught.value)
    assert "host 0" not in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).attempts == caught.value.attempts


def test_lost_hosts_are_replaced_as_often_as_allowed_whoever_asks(scheduler: Scheduler) -> None:
    MemoryJob(name="a").apply()
    job, other = MemoryJob(name="a", replace_lost=2), MemoryJob(name="a", replace_lost=2)
    scheduler.statuses[1] = "ended"
    assert listening(job) == ["tcp://127.0.0.1:4000", "tcp://127.0.0.1:4002"]
    scheduler.statuses[0] = "ended"
    assert listening(other) == ["tcp://127.0.0.1:4003", "tcp://127.0.0.1:4002"]
    scheduler.statuses[2] = "ended"

    with pytest.raises(LaunchError):
        listening(job)


def test_a_host_that_another_script_has_replaced_is_not_replaced_again(scheduler: Scheduler) -> None:
    job = MemoryJob(name="a", replace_lost=5)
    job.apply()
    lost = listening(job)[1]
    job._put_another(1, lost)
    job._put_another(1, lost)

    assert len(scheduler.statuses) == 3


class LostMesh:
    """Takes what a job says of a lost host."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def replace_host(self, rank: int, address: str) -> None:
        self.said.append(("replaced", rank, address))

    def give_up_host(self, rank: int) -> None:
        self.said.append(("given up", rank))


def test_the_mesh_is_given_another_host_for_a_lost_one_and_told_when_there_is_none(
    scheduler: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    job = MemoryJob(name="a", replace_lost=1)
    job.apply()
    job._use.addresses = listening(job)
    mesh: Any = LostMesh()
    scheduler.statuses[1] = "ended"
    job._on_host_lost(mesh, 1, "its link is cut")
    job._use.workers.pop().join(10)
    scheduler.statuses[0] = "ended"
    job._on_host_lost(mesh, 0, "its link is cut")
    job._use.workers.pop().join(10)

    assert mesh.said == [("replaced", 1, "tcp://127.0.0.1:4002"), ("given up", 0)]
    assert "host 0 was lost (its link is cut) and is not replaced" in caplog.text
    assert "replace_lost=1" in caplog.text


def test_the_end_of_a_job_ends_the_search_for_another_host(
    scheduler: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    job = MemoryJob(name="a", replace_lost=1)
    job.apply()
    job._use.addresses = listening(job)
    mesh: Any = LostMesh()
    scheduler.statuses[1], scheduler.starts_as = "ended", "pending"
    job._on_host_lost(mesh, 1, "its link is cut")
    (worker,) = job._use.workers
    job.kill()

    assert not worker.is_alive()
    assert mesh.said == []
    assert caplog.text == ""


def test_leaving_a_job_ends_it_for_all_scripts(scheduler: Scheduler) -> None:
    other = MemoryJob(name="a")
    with MemoryJob(name="a") as job:
        job.apply()
        assert other.state().status == "running"

    assert scheduler.running == []
    assert other.state().status == "ended"
    other.kill()
    assert saved_jobs() == []


def test_a_block_that_was_refused_does_not_end_the_job_of_that_name_that_runs(scheduler: Scheduler) -> None:
    MemoryJob(name="a", hosts=2).apply()

    with pytest.raises(JobSpecError), MemoryJob(name="a", hosts=3) as job:
        job.apply()
    with pytest.raises(JobSpecError, match="danaus job kill a"):
        job.kill()

    assert len(scheduler.running) == 2


def test_a_job_ends_even_if_its_mesh_cannot_be_let_go(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    job = MemoryJob(name="a")
    job.apply()

    def fail() -> None:
        raise RuntimeError("the agent has gone")

    monkeypatch.setattr(job, "_let_go", fail)
    with pytest.raises(RuntimeError, match="the agent has gone"):
        job.kill()

    assert scheduler.running == []
    assert saved_jobs() == []


def test_a_job_is_loaded_by_its_name_alone(scheduler: Scheduler) -> None:
    MemoryJob(name="a", hosts=3, tags=["x"]).apply()
    MemoryJob(name="b").apply()

    job = load_job("a")

    assert job.spec == MemorySpec(name="a", hosts=3, tags=("x",))
    assert saved_jobs() == ["a", "b"]
    job.kill()
    assert saved_jobs() == ["b"]
    with pytest.raises(JobError, match=r"no job 'a' .* there are: b"):
        load_job("a")


def test_a_job_is_named_after_its_kind_by_default_and_odd_names_are_refused() -> None:
    assert MemoryJob().name == "memory"
    for name in ("../up", "a b", "-a", "x" * 49):
        with pytest.raises(ValueError, match="letters, digits"):
            MemoryJob(name=name)
    with pytest.raises(ValueError, match="replace_lost=-1"):
        MemoryJob(replace_lost=-1)


def test_an_unknown_kind_is_told_with_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    with pytest.raises(JobError, match="expected one of kubernetes, local, ray, slurm, ssh"):
        kinds.class_of("mesos")
