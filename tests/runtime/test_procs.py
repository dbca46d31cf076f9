"""Processes as a script asks for them: what they find at their start, how many may be, and how they end."""

from __future__ import annotations

import asyncio
import os
import select
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest

from danaus import (
    Actor,
    AdmissionError,
    Channel,
    FailureKind,
    Port,
    ProcMesh,
    SpawnError,
    StoppedError,
    SupervisionError,
    endpoint,
    this_host,
    this_proc,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# The workers of a test run cannot import this file by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

LIMIT_S = 15


class Probe(Actor):
    """Tells about the process that it lives in."""

    @endpoint
    def pid(self) -> int:
        return os.getpid()

    @endpoint
    def parent(self) -> int:
        return os.getppid()

    @endpoint
    def env(self, name: str) -> str | None:
        return os.environ.get(name)

    @endpoint
    def modules(self) -> list[str]:
        return sorted(sys.modules)

    @endpoint
    def cpus(self) -> list[int]:
        return sorted(os.sched_getaffinity(0))

    @endpoint
    def place(self) -> tuple[str, list[str]]:
        return os.getcwd(), sys.path

    @endpoint
    def random(self) -> tuple[float, ...]:
        import random

        return (random.random(),)

    @endpoint
    def open_files(self) -> dict[str, str]:
        found = {}
        for fd in os.listdir("/proc/self/fd"):
            try:
                found[fd] = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                continue
        return found


@pytest.fixture(scope="module")
def procs() -> Iterator[ProcMesh]:
    with this_host().spawn_procs({"rank": 2}, name="plain", preload=[]) as procs:
        yield procs


def is_gone(pid: int, limit_s: float = 0.0) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], limit_s)[0])
    finally:
        os.close(pidfd)


def pids_of(procs: ProcMesh) -> list[int]:
    return list(procs.spawn("probe", Probe).pid.call().get(timeout=LIMIT_S))


def test_mesh_has_the_dimensions_asked_for_and_a_process_of_its_own_per_rank() -> None:
    with this_host().spawn_procs({"pp": 2, "dp": 2}, name="grid", preload=[]) as procs:
        assert (procs.extent.labels, procs.extent.sizes, len(procs)) == (("pp", "dp"), (2, 2), 4)
        assert len({*pids_of(procs), os.getpid()}) == 5
        assert pids_of(procs.slice(pp=1)) == pids_of(procs)[2:]


def test_mesh_without_dimensions_is_one_process() -> None:
    with this_host().spawn_procs(preload=[]) as procs:
        assert (procs.extent.labels, len(pids_of(procs))) == ((), 1)


def test_spawn_returns_at_once_and_initialized_tells_when_they_are_up() -> None:
    procs = this_host().spawn_procs({"rank": 2}, preload=[], bootstrap=_slow_bootstrap)
    try:
        assert not procs.initialized.done()
        assert procs.initialized.get(timeout=LIMIT_S) is None
        assert procs.initialized.get(timeout=LIMIT_S) is None
    finally:
        procs.stop().get(timeout=LIMIT_S)


def _slow_bootstrap() -> None:
    # The mesh must not be up before this has ended; what it waits for does not matter.
    time.sleep(0.2)


def test_thirty_processes_come_up_and_go_down() -> None:
    with this_host().spawn_procs({"rank": 30}, name="many", preload=[]) as procs:
        pids = pids_of(procs)
        assert len(set(pids)) == 30
        assert len(pids_of(procs)) == 30
    assert all(is_gone(pid) for pid in pids)


def test_processes_are_the_agents_children_and_not_the_scripts(procs: ProcMesh) -> None:
    [parent] = set(procs.spawn("probe", Probe).parent.call().get(timeout=LIMIT_S))

    assert parent != os.getpid()
    assert b"danaus" in Path(f"/proc/{parent}/cmdline").read_bytes()


def test_process_finds_the_scripts_directory_and_path(procs: ProcMesh) -> None:
    directory, path = procs.slice(rank=0).spawn("probe", Probe).place.call_one().get(timeout=LIMIT_S)

    assert directory == os.getcwd()
    assert path == sys.path


def test_process_holds_no_files_of_its_neighbours(procs: ProcMesh) -> None:
    with this_host().spawn_procs({"rank": 8}, name="files", preload=[]) as many:
        found = [files.values() for files in many.spawn("probe", Probe).open_files.call().get(timeout=LIMIT_S)]

    # Standard output and error; its pipes are no other's.
    pipes = [{name for name in files if name.startswith("pipe:")} for files in found]
    assert all(len(own) == 2 for own in pipes), pipes
    assert len(set.union(*pipes)) == 16


def test_forked_processes_draw_different_random_numbers(procs: ProcMesh) -> None:
    drawn = procs.spawn("probe", Probe).random.call().get(timeout=LIMIT_S)

    assert len(set(drawn)) == 2


def test_environment_is_set_before_anything_looks_and_in_no_other_process(procs: ProcMesh) -> None:
    seen: dict[str, str] = {"DANAUS_TEST_VALUE": "given", "OMP_NUM_THREADS": "3"}
    with this_host().spawn_procs({"rank": 2}, env=seen, preload=[], bootstrap=_note_environment) as own:
        probe = own.spawn("probe", Probe)
        assert list(probe.env.call("DANAUS_TEST_VALUE").get(timeout=LIMIT_S)) == ["given"] * 2
        assert list(probe.env.call("OMP_NUM_THREADS").get(timeout=LIMIT_S)) == ["3"] * 2
        assert list(probe.env.call("DANAUS_TEST_NOTED").get(timeout=LIMIT_S)) == ["given"] * 2
    other = procs.spawn("probe", Probe)
    assert list(other.env.call("DANAUS_TEST_VALUE").get(timeout=LIMIT_S)) == [None, None]
    assert "DANAUS_TEST_VALUE" not in os.environ


def _note_environment() -> None:
    os.environ["DANAUS_TEST_NOTED"] = os.environ["DANAUS_TEST_VALUE"]


def test_large_environment_reaches_many_processes() -> None:
    value = "x" * 20_000
    with this_host().spawn_procs({"rank": 12}, env={"DANAUS_TEST_LARGE": value}, preload=[]) as procs:
        found = procs.spawn("probe", Probe).env.call("DANAUS_TEST_LARGE").get(timeout=LIMIT_S)
        assert [len(each or "") for each in found] == [20_000] * 12


def test_preloaded_modules_are_there_and_others_are_not(procs: ProcMesh) -> None:
    with this_host().spawn_procs({"rank": 2}, preload=["wave", "colorsys"]) as own:
        for modules in own.spawn("probe", Probe).modules.call().get(timeout=LIMIT_S):
            assert {"wave", "colorsys"} <= set(modules)
    for modules in procs.spawn("probe", Probe).modules.call().get(timeout=LIMIT_S):
        assert not {"wave", "colorsys"} & set(modules)


def test_preload_that_starts_threads_falls_back_to_importing_in_each_process(tmp_path: Path) -> None:
    (tmp_path / "danaus_test_threads.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, args=(60,), daemon=True).start()\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        for _ in range(2):
            with this_host().spawn_procs({"rank": 2}, preload=["danaus_test_threads"]) as procs:
                for modules in procs.spawn("probe", Probe).modules.call().get(timeout=LIMIT_S):
                    assert "danaus_test_threads" in modules
    finally:
        sys.path.remove(str(tmp_path))


def test_preload_of_an_unknown_module_is_refused_at_the_call() -> None:
    with pytest.raises(ValueError, match="no module 'danaus_no_such_module'"):
        this_host().spawn_procs({"rank": 1}, preload=["danaus_no_such_module"])


def test_preload_that_fails_fails_the_mesh_with_its_traceback_and_can_be_mended(tmp_path: Path) -> None:
    path = tmp_path / "danaus_test_broken.py"
    path.write_text("raise RuntimeError('broken module')\n")
    sys.path.insert(0, str(tmp_path))
    try:
        procs = this_host().spawn_procs({"rank": 2}, name="broken", preload=["danaus_test_broken"])
        error = procs.initialized.exception(timeout=LIMIT_S)
        assert isinstance(error, SupervisionError)
        assert error.failure.kind is FailureKind.SPAWN_ERROR
        assert "danaus_test_broken" in str(error)
        assert "RuntimeError: broken module" in error.failure.report()
        procs.stop().get(timeout=LIMIT_S)

        path.write_text("mended = True\n")
        with this_host().spawn_procs({"rank": 1}, preload=["danaus_test_broken"]) as mended:
            assert "danaus_test_broken" in next(iter(mended.spawn("probe", Probe).modules.call().get(timeout=LIMIT_S)))
    finally:
        sys.path.remove(str(tmp_path))


def test_bootstrap_runs_in_every_process_before_any_actor() -> None:
    async def bootstrap() -> None:
        await asyncio.sleep(0)
        os.environ["DANAUS_TEST_BOOT"] = f"pid {os.getpid()}"

    with this_host().spawn_procs({"rank": 2}, bootstrap=bootstrap, preload=[]) as procs:
        probe = procs.spawn("probe", Probe)
        pids = probe.pid.call().get(timeout=LIMIT_S)
        assert list(probe.env.call("DANAUS_TEST_BOOT").get(timeout=LIMIT_S)) == [f"pid {pid}" for pid in pids]


@pytest.mark.parametrize("is_async", [False, True])
def test_bootstrap_that_raises_fails_the_mesh_with_its_traceback(is_async: bool, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)

    def bootstrap() -> None:
        # Until the test opens the other end.
        with open(gate, "rb"):
            raise RuntimeError("no boots")

    async def bootstrap_async() -> None:
        bootstrap()

    procs = this_host().spawn_procs(name="boots", bootstrap=bootstrap_async if is_async else bootstrap, preload=[])
    probe = procs.spawn("probe", Probe)
    futures = [procs.initialized, probe.pid.call_one(), probe.initialized]
    with open(gate, "wb"):
        for future in futures:
            error = future.exception(timeout=LIMIT_S)
            assert isinstance(error, SupervisionError)
            assert (error.failure.kind, error.failure.mesh) == (FailureKind.BOOTSTRAP_ERROR, "boots")
            assert "RuntimeError: no boots" in str(error)
            assert "in bootstrap" in error.failure.report()
    with pytest.raises(SupervisionError, match="no boots"):
        procs.spawn("more", Probe)
    procs.stop().get(timeout=LIMIT_S)


def test_bootstrap_that_exits_fails_the_mesh() -> None:
    procs = this_host().spawn_procs({"rank": 1}, bootstrap=lambda: os._exit(9), preload=[])

    error = procs.initialized.exception(timeout=LIMIT_S)

    assert isinstance(error, SupervisionError)
    assert error.failure.exit_code == 9
    procs.stop().get(timeout=LIMIT_S)


def test_bootstrap_that_cannot_be_pickled_is_refused_at_the_call() -> None:
    import threading

    lock = threading.Lock()
    with pytest.raises(TypeError, match="bootstrap"):
        this_host().spawn_procs({"rank": 1}, bootstrap=lambda: lock)


def test_processes_are_bound_to_the_cpus_asked_for() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    wanted = [cpus[0], cpus[-1]]

    binds = [{"cpus": str(cpu)} for cpu in wanted]
    with this_host().spawn_procs({"rank": 2}, proc_bind=binds, preload=[]) as procs:
        assert list(procs.spawn("probe", Probe).cpus.call().get(timeout=LIMIT_S)) == [[cpu] for cpu in wanted]


@pytest.mark.parametrize("binds", [[{"cpus": "0"}], [{"cpus": "0"}] * 3, [{"core": "0"}] * 2, [{"cpus": "99999"}] * 2])
def test_binding_that_does_not_fit_is_refused(binds: list[dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="proc_bind"):
        this_host().spawn_procs({"rank": 2}, proc_bind=binds)


def test_more_processes_than_fit_are_refused_with_the_arithmetic_before_the_first_starts() -> None:
    with pytest.raises(AdmissionError) as caught:
        this_host().spawn_procs({"rank": 10_000_000})

    error = caught.value
    assert isinstance(error, SpawnError)
    assert isinstance(error, ValueError)
    assert "10000000 procs x" in str(error)
    assert "ask for at most" in str(error)


@pytest.mark.parametrize("per_host", [{"rank": -1}, {"rank": 1.5}, {"rank": "2"}, {1: 2}])
def test_dimensions_that_make_no_sense_are_refused(per_host: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        this_host().spawn_procs(per_host)


@pytest.mark.parametrize("options", [{"env": {"A": 1}}, {"env": {1: "a"}}, {"gpus": "mine"}, {"bootstrap": 5}])
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        this_host().spawn_procs({"rank": 1}, **options)


def test_unknown_dimension_or_rank_of_a_slice_is_refused_and_names_what_there_is(procs: ProcMesh) -> None:
    with pytest.raises((TypeError, LookupError, ValueError), match="rank"):
        procs.slice(gpus=0)
    with pytest.raises(IndexError):
        procs.slice(rank=2)


def test_with_block_ends_its_processes_even_when_it_raises() -> None:
    pids: list[int] = []

    def main() -> None:
        with this_host().spawn_procs({"rank": 2}, preload=[]) as procs:
            pids.extend(pids_of(procs))
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        main()

    assert len(pids) == 2
    assert all(is_gone(pid) for pid in pids)


def test_async_with_block_ends_its_processes() -> None:
    async def main() -> list[int]:
        async with this_host().spawn_procs({"rank": 2}, preload=[]) as procs:
            await procs.initialized
            return list(await procs.spawn("probe", Probe).pid.call())

    assert all(is_gone(pid) for pid in asyncio.run(main()))


def test_stop_ends_the_processes_and_later_use_says_so() -> None:
    procs = this_host().spawn_procs({"rank": 2}, preload=[])
    probe = procs.spawn("probe", Probe)
    pids = list(probe.pid.call().get(timeout=LIMIT_S))

    procs.stop("done").get(timeout=LIMIT_S)
    procs.stop().get(timeout=LIMIT_S)

    assert all(is_gone(pid) for pid in pids)
    for future in (probe.pid.call(), procs.initialized, probe.initialized):
        error = future.exception(timeout=LIMIT_S)
        assert isinstance(error, StoppedError)
        assert "already been stopped" in str(error)
    with pytest.raises(StoppedError, match="already been stopped"):
        procs.spawn("more", Probe)


def test_stop_of_a_slice_leaves_the_other_ranks_running() -> None:
    with this_host().spawn_procs({"rank": 3}, preload=[]) as procs:
        pids = pids_of(procs)

        procs.slice(rank=1).stop().get(timeout=LIMIT_S)

        assert [is_gone(pid) for pid in pids] == [False, True, False]
        assert pids_of(procs.slice(rank=slice(0, 3, 2))) == [pids[0], pids[2]]


def test_stop_while_starting_ends_what_had_started() -> None:
    for _ in range(5):
        procs = this_host().spawn_procs({"rank": 3}, preload=[])
        probe = procs.spawn("probe", Probe)
        future = probe.pid.call()

        procs.stop().get(timeout=LIMIT_S)

        assert isinstance(future.exception(timeout=LIMIT_S), (SupervisionError, type(None)))


def test_process_that_ignores_its_stop_is_killed() -> None:
    class Stubborn(Actor):
        @endpoint
        def ignore(self) -> int:
            import signal

            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            return os.getpid()

        @endpoint
        def work(self, begun: Port[None]) -> None:
            begun.send(None)
            time.sleep(600)

    procs = this_host().spawn_procs(preload=[])
    stubborn = procs.spawn("stubborn", Stubborn)
    pid = stubborn.ignore.call_one().get(timeout=LIMIT_S)
    port, receiver = Channel.open()
    working = stubborn.work.call_one(port)
    receiver.recv().get(timeout=LIMIT_S)

    with pytest.raises(TimeoutError, match="still there"):
        procs.stop(timeout=0.2).get(timeout=LIMIT_S)
    procs.stop().get(timeout=LIMIT_S)

    assert is_gone(pid)
    assert isinstance(working.exception(timeout=LIMIT_S), StoppedError)


def test_actors_can_live_in_the_scripts_own_process() -> None:
    here = this_proc().spawn("here", Probe)

    assert here.pid.call_one().get(timeout=LIMIT_S) == os.getpid()
    here.stop().get(timeout=LIMIT_S)
    assert isinstance(here.pid.call_one().exception(timeout=LIMIT_S), StoppedError)
