"""Scripts written for torchrun, on the processes of a mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")

from danaus import Actor, ActorError, endpoint, this_host
from danaus.actors.spmd import ScriptFailedError, SPMDActor, setup_torch_elastic_env
from danaus.actors.torchrun import Placement, shared_devices

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.torch, pytest.mark.timeout(60)]

LIMIT_S = 30.0
PRELOAD = ("torch", "danaus.actors.spmd")


def test_ranks_count_on_their_host_and_over_all_as_under_torchrun() -> None:
    found = Placement(rank=4, hosts=(7, 7, 7, 2, 2)).environment()

    assert found == {
        "RANK": "4",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "2",
        "NODE_RANK": "1",
        "ROLE_RANK": "4",
        "ROLE_WORLD_SIZE": "5",
        "ROLE_NAME": "default",
    }


def test_hosts_whose_ranks_do_not_lie_together_are_counted_right() -> None:
    hosts = (0, 1, 0, 1)
    local = [Placement(rank=rank, hosts=hosts).environment()["LOCAL_RANK"] for rank in range(4)]
    groups = [Placement(rank=rank, hosts=hosts).environment()["GROUP_RANK"] for rank in range(4)]

    assert (local, groups) == (["0", "0", "1", "1"], ["0", "1", "0", "1"])


def test_local_rank_finds_each_ranks_own_gpu() -> None:
    assert shared_devices(["0,1,2,3", "1,2,3,0"]) == "0,1,2,3"
    assert shared_devices(["2,3,0,1", "3,0,1,2"]) == "2,3,0,1"


def test_gpus_that_are_shared_or_cut_up_or_not_there_stay_as_they_are() -> None:
    assert shared_devices(["", ""]) is None
    assert shared_devices(["0,1", "0,1"]) is None
    assert shared_devices(["MIG-a", "MIG-b"]) is None


@pytest.fixture
def procs() -> Iterator[Any]:
    with this_host().spawn_procs({"gpus": 2}, name="spmd", preload=PRELOAD) as mesh:
        yield mesh


@pytest.fixture
def spmd(procs: Any) -> Any:
    return procs.spawn("spmd", SPMDActor, preload=PRELOAD)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


SUM = """
import os, sys, torch, torch.distributed as dist
from helper import double
if __name__ == "__main__":
    dist.init_process_group("gloo")
    ones = torch.full((1,), double(dist.get_rank() + 1.0))
    dist.all_reduce(ones)
    dist.destroy_process_group()
    with open(f"{sys.argv[1]}/{os.environ['RANK']}", "w") as file:
        print(ones.item(), sys.argv[2:], os.path.basename(__file__), dist.is_initialized(), file=file)
"""


def test_a_script_runs_as_main_on_all_ranks_time_after_time(spmd: Any, tmp_path: Path) -> None:
    write(tmp_path / "helper.py", "def double(x): return 2 * x\n")
    script = write(tmp_path / "train_sum.py", SUM)

    for lr in ("1", "2"):
        as_list(spmd.main, [script, str(tmp_path), "--lr", lr])

        expected = f"6.0 ['--lr', '{lr}'] train_sum.py False\n"
        assert [(tmp_path / rank).read_text(encoding="utf-8") for rank in "01"] == [expected] * 2


def as_list(adverb: Any, *args: Any) -> list[Any]:
    return list(adverb.options(timeout=LIMIT_S).call(*args).get().values())


@pytest.mark.parametrize(
    ("text", "expected", "message"),
    [
        ("raise ValueError('bad batch')", ValueError, "bad batch"),
        ("import sys; sys.exit(3)", ScriptFailedError, "exited with code 3"),
        ("raise SystemExit('no data')", ScriptFailedError, "exited with code 1"),
    ],
    ids=["error", "code", "message"],
)
def test_what_ends_a_script_reaches_the_caller_and_the_processes_live(
    spmd: Any, text: str, expected: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ActorError, match=message) as caught:
        as_list(spmd.main, [write(tmp_path / "fails.py", text)])

    assert isinstance(caught.value.exception, expected)
    assert as_list(spmd.incarnation) == [0, 0]


def test_the_process_is_what_it_was_once_a_script_is_done(spmd: Any, procs: Any, tmp_path: Path) -> None:
    look: Any = procs.spawn("look", Look)
    before = as_list(look.look)

    as_list(spmd.main, [write(tmp_path / "argv.py", "import sys; sys.argv.append('x'); sys.path.append('y')")])

    assert as_list(look.look) == before
    assert "sys.argv.append" not in str(before)


class Look(Actor):
    @endpoint
    def look(self) -> tuple[Any, ...]:
        import signal
        import sys

        return sys.argv, sys.path, sys.modules["__main__"].__name__, str(signal.getsignal(signal.SIGINT))

    @endpoint
    def total(self) -> float:
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")  # type: ignore[attr-defined]
        ones = torch.ones(1)
        dist.all_reduce(ones)  # type: ignore[attr-defined]
        dist.destroy_process_group()  # type: ignore[attr-defined]
        return ones.item()


def test_a_script_that_cannot_be_is_refused(spmd: Any) -> None:
    for args in ([], ["-m"]):
        with pytest.raises(ActorError, match=r'expected \["script.py"'):
            as_list(spmd.main, args)
    with pytest.raises(ActorError, match="give both, or none"):
        as_list(spmd.setup_env, "127.0.0.1")


def test_scripts_are_refused_a_thread_that_is_not_the_main_one(spmd: Any, procs: Any) -> None:
    second: Any = procs.spawn("second", SPMDActor)

    with pytest.raises(ActorError, match="spawn SPMDActor before other actors"):
        as_list(second.main, ["nowhere.py"])


def test_an_address_of_the_users_own_is_taken_and_no_store_started(spmd: Any) -> None:
    found = as_list(spmd.setup_env, "10.0.0.1", 29500, 4)

    assert [each["MASTER_ADDR"] for each in found] == ["10.0.0.1"] * 2
    assert [each["MASTER_PORT"] for each in found] == ["29500"] * 2
    assert [each["TORCHELASTIC_USE_AGENT_STORE"] for each in found] == ["False"] * 2
    assert [each["TORCHELASTIC_RESTART_COUNT"] for each in found] == ["4"] * 2


def test_actors_find_the_others_by_the_environment_alone(procs: Any) -> None:
    held = setup_torch_elastic_env(procs)
    look: Any = procs.spawn("look", Look)

    assert as_list(look.total) == [2.0, 2.0]
    held.stop().get()
