"""`danaus run --nproc`: scripts written for torchrun, on real processes, to the exit code."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

import pytest

from danaus.tools import run
from danaus.tools.spmd_run import TERM_LIMIT_S

from ..runtime.network.hosts import daemons

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

pytest.importorskip("torch")

pytestmark = [pytest.mark.torch, pytest.mark.timeout(60)]

LIMIT_S = 45


@contextlib.contextmanager
def started(*arguments: object, cwd: Path) -> Generator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "danaus.tools.cli", "run", *map(str, arguments)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=cwd, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


def start(*arguments: object, cwd: Path, limit_s: float = LIMIT_S) -> tuple[int, str, str]:
    with started(*arguments, cwd=cwd) as process:
        out, err = process.communicate(timeout=limit_s)
        return process.returncode, out, err


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


TRAIN = """
import os, pathlib, sys
import torch, torch.distributed as dist
from torch.utils.data import DataLoader
from beside import TEXT

class Squares(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, at): return at * at

def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert rank == int(os.environ["LOCAL_RANK"]) == int(os.environ["RANK"])
    batches = DataLoader(Squares(), batch_size=4, num_workers=1, multiprocessing_context="fork")
    total = torch.tensor([float(sum(batch.sum().item() for batch in batches))])
    dist.all_reduce(total)
    everyone = dist.new_group()
    dist.barrier(group=everyone)
    print("total", total.item(), sys.argv[1:], TEXT, os.path.basename(__file__))
    print("rank", rank, "of", dist.get_world_size())
    dist.destroy_process_group()

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("kind", ["file", "module"])
def test_a_script_for_torchrun_runs_unchanged_with_its_lines_marked(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "beside.py", "TEXT = 'found'")
    write(tmp_path / "train.py", TRAIN)
    script = ["train.py"] if kind == "file" else ["-m", "train"]

    code, out, err = start("--nproc", 3, *script, "--lr", "1e-3", "-m", cwd=tmp_path)

    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "[train 0-2] total 420.0 ['--lr', '1e-3', '-m'] found train.py (x3)" in lines
    assert [f"[train {rank}] rank {rank} of 3" for rank in range(3)] == sorted(
        line for line in lines if " of 3" in line
    )


def test_a_rank_that_raises_ends_all_and_is_named(tmp_path: Path) -> None:
    text = """
import torch.distributed as dist
def step():
    raise ValueError("bad batch")
dist.init_process_group("gloo")
dist.barrier()
if dist.get_rank() == 1:
    step()
dist.barrier()
"""
    code, out, err = start("--nproc", 3, write(tmp_path / "train.py", text), cwd=tmp_path)

    assert (code, out) == (1, "")
    lines = err.splitlines()
    shown = [line for line in lines if line.startswith("[train 1] ")]
    # Torch puts the rank before each line.
    assert shown[0] == "[train 1] [rank1]: Traceback (most recent call last):"
    assert shown[1] == f'[train 1] [rank1]:   File "{tmp_path}/train.py", line 8, in <module>'
    assert shown[-1] == "[train 1] [rank1]: ValueError: bad batch"
    # What the others' collectives raised only follows from it.
    assert "Connection" not in err
    assert re.fullmatch(r"danaus run: train rank 1 \(host \S+, pid \d+\) exited with code 1", lines[-1])


def test_a_killed_rank_has_all_start_again_with_the_next_restart_count(tmp_path: Path) -> None:
    text = """
import os, signal
import torch, torch.distributed as dist
dist.init_process_group("gloo")
count = os.environ["TORCHELASTIC_RESTART_COUNT"]
dist.barrier()
if count == "0" and dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    dist.barrier()
except RuntimeError:
    raise SystemExit("released")
print("count", count, "of", os.environ["TORCHELASTIC_MAX_RESTARTS"])
"""
    code, out, err = start("--nproc", 3, "--restart", 2, write(tmp_path / "train.py", text), cwd=tmp_path)

    assert code == 0
    assert out == "[train 0-2] count 1 of 2 (x3)\n"
    assert "rank 1" in err
    assert "was killed by SIGKILL" in err
    assert "danaus run: starting again (1 of 2)" in err


def test_ranks_of_several_hosts_meet_and_count_by_host(tmp_path: Path) -> None:
    text = """
import os
import torch, torch.distributed as dist
dist.init_process_group("gloo")
ones = torch.ones(1)
dist.all_reduce(ones)
names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
print(ones.item(), *(os.environ[name] for name in names))
dist.destroy_process_group()
"""
    script = write(tmp_path / "train.py", text)
    with daemons(2) as found:
        hosts = ",".join(found.addresses)

        code, out, err = start("--hosts", hosts, "--key", found.key, "--nproc", 2, script, cwd=tmp_path)

    assert (code, err) == (0, "")
    assert sorted(out.splitlines()) == [
        "[train 0] 4.0 0 0 2 0 2",
        "[train 1] 4.0 1 1 2 0 2",
        "[train 2] 4.0 2 0 2 1 2",
        "[train 3] 4.0 3 1 2 1 2",
    ]


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_lost_host_is_replaced_and_all_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
import os, signal, time
import torch, torch.distributed as dist
def parent(pid):
    return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
dist.init_process_group("gloo")
dist.barrier()
count = os.environ["TORCHELASTIC_RESTART_COUNT"]
if count == "0" and dist.get_rank() == 1:
    agent = parent(os.getpid())
    for pid in (parent(agent), agent):
        os.kill(pid, signal.SIGKILL)
    time.sleep(600)
dist.barrier()
print("count", count)
dist.destroy_process_group()
"""
    write(tmp_path / "job.py", "from danaus import LocalJob\njob = LocalJob(hosts=2, name='spmd', replace_lost=1)\n")
    monkeypatch.setenv("DANAUS_GRACE_S", "2")
    monkeypatch.setenv("DANAUS_STATE_DIR", str(tmp_path / "state"))
    # What a killed agent leaves behind is in there.
    with tempfile.TemporaryDirectory(prefix="dr-", dir="/tmp") as sockets:
        monkeypatch.setenv("DANAUS_SOCKET_DIR", sockets)
        write(tmp_path / "train.py", text)

        code, out, err = start("--job", "job.py", "--nproc", 1, "--restart", 1, "train.py", cwd=tmp_path, limit_s=120)

    assert (code, out) == (0, "[train 0-1] count 1 (x2)\n")
    assert "failed (host lost)" in err
    assert "danaus run: starting again (1 of 1)" in err


def test_restarts_are_counted_and_the_last_failures_code_is_the_exit_code(tmp_path: Path) -> None:
    text = """
import os, sys
print("count", os.environ["TORCHELASTIC_RESTART_COUNT"])
if os.environ["RANK"] == "0":
    sys.exit(3)
"""
    code, out, err = start("--nproc", 2, "--restart", 1, write(tmp_path / "train.py", text), cwd=tmp_path)

    assert code == 3
    assert "count 1" in out
    assert "count 2" not in out
    assert err.splitlines()[-1].endswith("exited with code 3, after 1 restart")


def test_what_python_does_at_the_end_is_done_on_each_rank(tmp_path: Path) -> None:
    text = """
import atexit, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
ready = threading.Event()
atexit.register(lambda: print("hook"))
threading.Thread(target=lambda: (ready.wait(), print("thread"))).start()
ThreadPoolExecutor(1).submit(print, "worker").result()
ready.set()
if os.environ["RANK"] == "1":
    print("at once", flush=True)
    os._exit(0)
"""
    code, out, err = start("--nproc", 2, write(tmp_path / "train.py", text), cwd=tmp_path)

    assert (code, err) == (0, "")
    first = [line.removeprefix("[train 0] ") for line in re.sub(r"0-1\] (.*) \(x2\)", r"0] \1", out).splitlines()]
    assert [line for line in first if line in {"worker", "thread", "hook"}] == ["worker", "thread", "hook"]
    assert "[train 1] at once" in out
    assert "[train 1] hook" not in out


@pytest.mark.parametrize("handles", [False, True])
def test_an_interrupt_ends_all_ranks_which_hear_of_it_by_sigterm(handles: bool, tmp_path: Path) -> None:
    text = f"""
import signal, sys, time
def on_term(*_):
    print("checkpoint written")
    sys.exit(0)
if {handles}:
    signal.signal(signal.SIGTERM, on_term)
print("ready")
time.sleep(600)
"""
    script = write(tmp_path / "train.py", text)
    with started("--nproc", 2, script, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "[train 0-1] ready (x2)\n"

        interrupted_s = time.monotonic()
        os.kill(process.pid, signal.SIGINT)

        out, err = process.communicate(timeout=LIMIT_S)
        # At once, and not when the processes' time to end is over.
        assert time.monotonic() - interrupted_s < TERM_LIMIT_S
    assert (process.returncode, err) == (130, "")
    assert out == ("[train 0-1] checkpoint written (x2)\n" if handles else "")


def test_a_script_that_is_not_there_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--nproc", "2", str(tmp_path / "nowhere.py")]) == 1

    assert capsys.readouterr().err.endswith("nowhere.py': No such file or directory\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc", "0", "x.py"], "--nproc 0: give the number of processes"),
        (["--nproc", "2", "--restart", "-1", "x.py"], "--restart -1: give a number of restarts"),
        (["--restart", "2", "x.py"], "--restart is for scripts written for torchrun: give --nproc"),
        (["--gpus", "none", "x.py"], "--gpus is for scripts written for torchrun: give --nproc"),
        (["--hosts", "tcp://a:1", "x.py"], "--hosts is for scripts written for torchrun: give --nproc"),
        (["--nproc", "2", "--hosts", "tcp://a:1", "x.py"], "--hosts and --key belong together"),
        (["--nproc", "2", "--key", "key", "x.py"], "--hosts and --key belong together"),
        (["--nproc", "2", "--hosts", "tcp://a:1", "--job", "j", "x.py"], "--hosts and --job: give one of them"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(arguments)

    assert ended.value.code == 2
    assert message in capsys.readouterr().err
