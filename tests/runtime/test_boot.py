"""What a spawn asks of the host agent: checked before anything starts, and readable by the processes it starts."""

from __future__ import annotations

import functools
import os
import stat
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import msgpack
import pytest

from danaus.runtime.errors import AdmissionError
from danaus.runtime.host.boot import BootPlan, make_plan, read_boot_file, write_boot_file
from danaus.runtime.messages import wire


class FakeProc(SimpleNamespace):
    """What a plan needs of the process that makes it."""

    def __init__(self, directory: Path) -> None:
        place = str(directory)
        super().__init__(proc_id="me.0", slot=0, directory=place, requests=[], job_directory=lambda: place)

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

    def request(self, name: str, fields: dict[str, Any]) -> None:
        self.requests.append((name, fields))


@pytest.fixture
def local(tmp_path: Path) -> FakeProc:
    """The spawning process, with a directory of its own."""
    return FakeProc(tmp_path)


def plan(local: FakeProc, **changed: Any) -> BootPlan:
    settings: dict[str, Any] = {
        "mesh_id": "workers-1",
        "name": "workers",
        "count": 2,
        "dims": (("gpus", 2),),
        "spares": 0,
        "restartable": False,
        "bootstrap": None,
        "env": {},
        "preload": [],
        "proc_bind": None,
        "gpus": "own",
    }
    return make_plan(local, **settings | changed)  # type: ignore[arg-type]


def key_of(local: FakeProc, **changed: Any) -> str:
    """The zygote that such a spawn uses."""
    fields = plan(local, **changed).fields
    os.unlink(fields["boot_file"])
    return fields["zygote"]


def files(local: FakeProc) -> list[str]:
    return os.listdir(local.directory)


def test_a_plan_is_plain_data_for_an_agent_that_never_unpickles(local: FakeProc) -> None:
    made = plan(local, bootstrap=lambda: 1, env={"A": "b"}, preload=["json"], proc_bind=None)

    packed = wire.pack([wire.REQUEST, "spawn", "controller.0", made.fields])
    fields = msgpack.unpackb(packed)[3]

    assert (fields["mesh"], fields["name"], fields["count"], fields["gpus"]) == ("workers-1", "workers", 2, "own")
    assert fields["preload"] == ["json"]
    assert fields["env"]["A"] == "b"


def test_a_plan_orders_every_rank_and_says_what_reports_need(local: FakeProc) -> None:
    fields = plan(local, count=2, spares=3, restartable=True).fields

    assert fields["procs"] == ["workers-1.0", "workers-1.1"]
    assert (fields["spares"], fields["restartable"], fields["dims"]) == (3, True, [("gpus", 2)])


def test_spares_count_as_processes_that_the_host_has_to_hold(local: FakeProc) -> None:
    with pytest.raises(AdmissionError) as told:
        plan(local, count=1, spares=999_999_999)

    assert told.value.num_procs == 1_000_000_000
    assert files(local) == []


def test_a_plan_is_sent_as_one_request(local: FakeProc) -> None:
    made = plan(local)
    assert local.requests == []

    made.submit(local)  # type: ignore[arg-type]

    assert local.requests == [("spawn", made.fields)]


# the boot file


def test_a_process_reads_back_what_the_spawner_wrote(local: FakeProc) -> None:
    offset = 40
    boot = read_boot_file(plan(local, bootstrap=lambda: offset + 2).fields["boot_file"])

    assert boot.bootstrap is not None
    assert boot.bootstrap() == 42
    assert (boot.sys_path, boot.directory, boot.argv0) == (sys.path, os.getcwd(), sys.argv[0])


def test_without_a_bootstrap_there_is_none_to_run(local: FakeProc) -> None:
    assert read_boot_file(plan(local).fields["boot_file"]).bootstrap is None


def test_a_bootstrap_may_be_any_callable(local: FakeProc) -> None:
    boot = read_boot_file(plan(local, bootstrap=functools.partial(pow, 2, 5)).fields["boot_file"])

    assert boot.bootstrap is not None
    assert boot.bootstrap() == 32


def test_the_boot_file_is_private(local: FakeProc) -> None:
    status = os.stat(plan(local).fields["boot_file"])

    assert stat.S_IMODE(status.st_mode) == 0o600


def test_a_boot_file_is_never_written_over_another(local: FakeProc) -> None:
    made = plan(local)

    again = write_boot_file(local, "workers-1", b"something else")  # type: ignore[arg-type]

    assert again == made.fields["boot_file"]
    assert Path(again).read_bytes() == made.boot


def test_a_boot_file_that_is_gone_is_written_again_into_the_directory_of_now(local: FakeProc, tmp_path: Path) -> None:
    made = plan(local, bootstrap=functools.partial(pow, 2, 5))
    second = tmp_path / "second"
    second.mkdir()
    local.job_directory = lambda: str(second)

    path = write_boot_file(local, "workers-1", made.boot)  # type: ignore[arg-type]

    assert os.path.dirname(path) == str(second)
    boot = read_boot_file(path)
    assert boot.bootstrap is not None
    assert boot.bootstrap() == 32


def test_a_bootstrap_that_cannot_be_pickled_is_refused_and_leaves_no_file(local: FakeProc) -> None:
    lock = threading.Lock()

    with pytest.raises(TypeError, match=r"bootstrap=.*cannot be pickled"):
        plan(local, bootstrap=lambda: lock)
    assert files(local) == []


def test_a_file_that_is_no_boot_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.boot"
    path.write_bytes(cloudpickle.dumps({"bootstrap": None}))

    with pytest.raises(TypeError, match="expected a BootFile, got dict"):
        read_boot_file(str(path))


# bad settings


@pytest.mark.parametrize(
    ("changed", "error", "why"),
    [
        ({"gpus": "all"}, ValueError, r'gpus=\'all\'.*"own", "shared" or "none"'),
        ({"env": {"A": 1}}, TypeError, r"env=\.\.\..*text; got 'A': 1"),
        ({"env": {1: "a"}}, TypeError, "got 1: 'a'"),
        ({"preload": ["no_such_module"]}, ValueError, "there is no module 'no_such_module'"),
        ({"preload": ["no_such_package.module"]}, ValueError, "there is no module 'no_such_package.module'"),
        ({"preload": ["json.no_such_module"]}, ValueError, "there is no module"),
        ({"preload": "torch"}, TypeError, r"preload=\['torch'\]"),
        ({"bootstrap": 7}, TypeError, "bootstrap=7"),
        ({"proc_bind": [{"cpus": "0"}]}, ValueError, "1"),
    ],
)
def test_a_bad_setting_is_refused_before_anything_is_written(
    local: FakeProc, changed: dict[str, Any], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        plan(local, **changed)

    assert files(local) == []
    assert local.requests == []


def test_more_processes_than_the_host_can_hold_are_refused_with_the_arithmetic(local: FakeProc) -> None:
    with pytest.raises(AdmissionError, match="1000000000") as told:
        plan(local, count=1_000_000_000)

    assert told.value.num_procs == 1_000_000_000
    assert 0 <= told.value.max_procs < 1_000_000_000
    assert files(local) == []


# environment and threads


def test_the_callers_environment_wins(local: FakeProc) -> None:
    env = plan(local, env={"OMP_NUM_THREADS": "5"}).fields["env"]

    assert env["OMP_NUM_THREADS"] == "5"


def test_what_is_read_at_import_goes_to_the_zygote_too(local: FakeProc) -> None:
    fields = plan(local, env={"TORCH_LOGS": "x", "MY_VARIABLE": "y", "CUDA_MODULE_LOADING": "z"}).fields

    assert fields["zygote_env"] == {"TORCH_LOGS": "x", "CUDA_MODULE_LOADING": "z"}


def test_cpus_are_bound_as_asked(local: FakeProc) -> None:
    fields = plan(local, proc_bind=[{"cpus": "0"}, {}]).fields

    assert (fields["cpus"], fields["mem_nodes"]) == ([[0], None], [None, None])


# the zygote


def test_torch_and_numpy_are_preloaded_where_the_caller_has_them(
    local: FakeProc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numpy", sys)
    monkeypatch.delitem(sys.modules, "torch", raising=False)

    assert plan(local, preload=None).fields["preload"] == ("numpy",)


def test_a_module_is_preloaded_once(local: FakeProc) -> None:
    assert plan(local, preload=["json", "csv", "json"]).fields["preload"] == ("json", "csv")


def test_without_modules_the_plain_zygote_serves_everyone(local: FakeProc) -> None:
    assert key_of(local) == key_of(local, env={"TORCH_LOGS": "x"}) == "plain"


def test_the_same_spawn_uses_the_same_zygote(local: FakeProc) -> None:
    first = key_of(local, preload=["json"], env={"A": "b"})

    assert first == key_of(local, preload=["json"], env={"C": "d"}, count=1)
    assert first != "plain"


def test_other_modules_or_another_import_time_environment_use_another_zygote(local: FakeProc) -> None:
    keys = [
        key_of(local, preload=["json"]),
        key_of(local, preload=["csv"]),
        key_of(local, preload=["json", "csv"]),
        key_of(local, preload=["json"], env={"OMP_SCHEDULE": "static"}),
        key_of(local, preload=["json"], env={"OMP_SCHEDULE": "dynamic"}),
    ]

    assert len(set(keys)) == len(keys)


def test_a_changed_module_uses_another_zygote(local: FakeProc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    source = folder / "preloaded_by_a_test.py"
    source.write_text("x = 1\n")
    first = key_of(local, preload=[source.stem])
    assert key_of(local, preload=[source.stem]) == first

    source.write_text("x = 12\n")

    assert key_of(local, preload=[source.stem]) != first
