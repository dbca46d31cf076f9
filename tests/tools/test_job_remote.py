"""`danaus job exec`, `shell` and `logs`, for real on daemons of this machine."""

from __future__ import annotations

import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

import danaus
from danaus.runtime.jobs.local_job import LocalJob
from danaus.runtime.jobs.remote import WINDOW, Commands, newest_run
from danaus.tools import job as job_tool

LIMIT_S = 60.0
pytestmark = pytest.mark.timeout(2 * LIMIT_S)


def danaus_job(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "danaus.tools.job", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, input=stdin, check=False)


def test_exec_runs_a_line_of_shell_on_every_host(running: LocalJob) -> None:
    done = danaus_job("exec", "train", "--", "echo out $DANAUS_HOST_INDEX; echo err >&2")

    assert sorted(done.stdout.splitlines()) == ["[0] out 0", "[1] out 1"]
    assert sorted(done.stderr.splitlines()) == ["[0] err", "[1] err"]
    assert done.returncode == 0


def test_exec_fails_with_the_highest_exit_code_and_says_where(running: LocalJob) -> None:
    done = danaus_job("exec", "train", "--", "exit $((3 + DANAUS_HOST_INDEX))")

    assert done.returncode == 4
    said = "danaus job exec: host 0 (train-0): exit code 3\ndanaus job exec: host 1 (train-1): exit code 4\n"
    assert done.stderr == said


def test_exec_on_one_host_runs_several_words_as_they_are(running: LocalJob) -> None:
    done = danaus_job("exec", "train", "--host", "1", "--", sys.executable, "-c", "print('a  $HOME')")

    assert (done.returncode, done.stdout, done.stderr) == (0, "a  $HOME\n", "")


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (("no-such-program", "x"), 127, "no-such-program: No such file or directory"),
        (("/etc/passwd", "x"), 126, "/etc/passwd: Permission denied"),
        (("sh", "-c", "kill -9 $$"), 137, "exit code 137"),
    ],
)
def test_exec_has_the_exit_codes_of_a_shell(running: LocalJob, command: tuple[str, ...], code: int, said: str) -> None:
    done = danaus_job("exec", "train", "--host", "0", "--", *command)

    assert done.returncode == code
    assert said in done.stderr


@pytest.mark.slow
def test_exec_shows_much_output_whole_and_in_order(running: LocalJob) -> None:
    num_lines = 2_000_000

    done = danaus_job("exec", "train", "--host", "0", "--", f"seq {num_lines}")

    assert done.stdout == "".join(f"{number}\n" for number in range(1, num_lines + 1))


def test_a_command_waits_for_who_shows_its_output() -> None:
    procs = danaus.this_host().spawn_procs(name="danaus-job")
    actor = procs.spawn("commands", Commands)
    port, receiver = danaus.Channel[Any].open()
    call = actor.run.call_one(["yes", "x" * 1000], 0, port)
    for _ in range(WINDOW):
        assert receiver.recv().get(timeout=LIMIT_S).source == "out"
    further = receiver.recv()
    with pytest.raises(TimeoutError):
        further.get(timeout=0.5)
    assert not call.done()

    actor.more.broadcast(1)
    assert further.get(timeout=LIMIT_S).data
    actor.end.broadcast()

    assert call.get(timeout=LIMIT_S) == 128 + signal.SIGHUP
    procs.stop().get(timeout=LIMIT_S)


def test_exec_of_a_command_leaves_nothing_running(running: LocalJob) -> None:
    done = danaus_job("exec", "train", "--host", "0", "--", "sleep 1000 >/dev/null 2>&1 & echo $!")

    pid = int(done.stdout)
    deadline_s = time.monotonic() + LIMIT_S
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline_s, f"process {pid} outlived danaus job exec"
        time.sleep(0.02)


def test_an_interrupted_exec_ends_what_runs_on_the_hosts(running: LocalJob) -> None:
    command = [sys.executable, "-u", "-m", "danaus.tools.job", "exec", "train", "--", "echo $$; sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        pids = [int(client.stdout.readline().partition("] ")[2]) for _ in range(2)]
        client.send_signal(signal.SIGINT)
        assert client.wait(LIMIT_S) == job_tool.INTERRUPTED

    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


@pytest.mark.slow
def test_a_host_that_is_lost_fails_its_part_only(alone: Path) -> None:
    with LocalJob(hosts=2, name="two", detached=True) as job:
        job.apply()
        job._wait_listening(LIMIT_S, time.monotonic() + LIMIT_S)
        go_on = alone / "go-on"
        script = f"echo up; until [ -e {go_on} ]; do sleep 0.05; done; echo done"
        command = [sys.executable, "-u", "-m", "danaus.tools.job", "exec", "two", "--", script]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            assert client.stderr is not None
            for _ in range(2):
                client.stdout.readline()
            os.kill(job._record().launched["hosts"][1]["pid"], signal.SIGKILL)
            while "host lost" not in client.stderr.readline():
                assert client.poll() is None, "it has ended without a word of the loss"
            go_on.touch()
            out, err = client.communicate(timeout=LIMIT_S)

        assert out == "[0] done\n"
        assert "danaus job exec: host 1 (two-1): " in err
        assert client.returncode == 255
        rest = danaus_job("exec", "two", "--", "echo still here")
        assert (rest.stdout, rest.returncode) == ("still here\n", 1)
        assert "host 1 was left out: ended" in rest.stderr


def test_a_shell_has_a_terminal_of_the_same_size_and_its_exit_code(running: LocalJob) -> None:
    ours, theirs = pty.openpty()
    ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    command = [sys.executable, "-m", "danaus.tools.job", "shell", "train", "--host", "1", "--", "sh", "-i"]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    screen = Screen(ours)
    try:
        screen.wait_for("# " if os.geteuid() == 0 else "$ ")
        screen.type("stty size; tty\n")
        screen.wait_for("40 100")
        screen.wait_for("/dev/pts/")
        screen.type("sleep 1000; echo no\n")
        screen.wait_for("echo no\r\n")
        # Ctrl-C is the far command's, not ours.
        screen.type_until("\x03", "^C")
        screen.type("echo back-$((1 + 1))\n")
        screen.wait_for("back-2")
        screen.type("exit 7\n")
        assert child.wait(LIMIT_S) == 7
    finally:
        child.kill()
        child.wait()
        os.close(ours)


class Screen:
    """Our end of a terminal, with what has been shown on it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._text = descriptor, ""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def type_until(self, key: str, expected: str) -> None:
        """Press a key again and again, since the program may not listen yet."""
        deadline_s = time.monotonic() + LIMIT_S
        while not self._shows(expected, 0.5):
            assert time.monotonic() < deadline_s, f"{expected!r} is not shown: {self._text!r}"
            self.type(key)

    def wait_for(self, expected: str) -> None:
        assert self._shows(expected, LIMIT_S), f"{expected!r} is not shown: {self._text!r}"

    def _shows(self, expected: str, limit_s: float) -> bool:
        deadline_s = time.monotonic() + limit_s
        while expected not in self._text:
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0 or not select.select([self._descriptor], [], [], remaining_s)[0]:
                return False
            self._text += os.read(self._descriptor, 65536).decode(errors="replace")
        self._text = self._text.partition(expected)[2]
        return True


def test_a_shell_takes_a_script_from_its_input(running: LocalJob) -> None:
    done = danaus_job("shell", "train", "--", "sh", stdin="echo piped-$((1 + 1))\nexit 5\n")

    assert "piped-2" in done.stdout
    assert done.returncode == 5


CONTROLLER = """
import sys
from danaus import Actor, endpoint
from danaus.runtime.jobs import load_job

class Speaker(Actor):
    @endpoint
    def say(self, text):
        print(text, flush=True)

if __name__ == "__main__":
    job = load_job("train")
    hosts = job.hosts()
    procs = hosts.spawn_procs({"gpus": 2}, name="trainer")
    procs.spawn("speaker", Speaker).say.call(sys.argv[1]).get(timeout=30)
    procs.stop().get(timeout=30)
    hosts.stop()
"""


@pytest.mark.slow
def test_logs_are_those_of_the_newest_run_on_all_hosts(running: LocalJob, tmp_path: Path) -> None:
    before = danaus_job("logs", "train")
    script = tmp_path / "controller.py"
    script.write_text(CONTROLLER, encoding="utf-8")
    for text in ("first", "second"):
        subprocess.run([sys.executable, script, text], check=True, timeout=LIMIT_S, capture_output=True)

    after = danaus_job("logs", "train")

    assert "no rank of job 'train' has written anything yet" in before.stderr
    assert sorted(after.stdout.splitlines()) == [f"[trainer {rank}] second" for rank in range(4)]
    assert after.returncode == 0


def test_logs_of_the_daemons_need_no_connection(running: LocalJob) -> None:
    done = danaus_job("logs", "train", "--daemon", "--host", "1")

    assert done.stdout.startswith("[1] danaus host: train-1 listens on tcp://127.0.0.1:")


@pytest.mark.slow
def test_followed_logs_go_on_with_what_is_written_and_with_the_next_run(running: LocalJob, tmp_path: Path) -> None:
    script = tmp_path / "controller.py"
    script.write_text(CONTROLLER, encoding="utf-8")
    subprocess.run([sys.executable, script, "before"], check=True, timeout=LIMIT_S, capture_output=True)
    command = [sys.executable, "-u", "-m", "danaus.tools.job", "logs", "train", "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        try:
            assert follower.stdout is not None
            first = {follower.stdout.readline() for _ in range(4)}
            subprocess.run([sys.executable, script, "later"], check=True, timeout=LIMIT_S, capture_output=True)
            second = {follower.stdout.readline() for _ in range(4)}
        finally:
            follower.send_signal(signal.SIGINT)
            follower.wait(LIMIT_S)
    assert first == {f"[trainer {rank}] before\n" for rank in range(4)}
    assert second == {f"[trainer {rank}] later\n" for rank in range(4)}
    assert follower.returncode == job_tool.INTERRUPTED


def test_the_newest_run_is_the_one_written_last_and_not_our_own(tmp_path: Path) -> None:
    base = tmp_path / "node_1"
    for run, file, age_s in (
        ("r1", "train-aaaaaa.0.log", 20),
        ("r2", "train-bbbbbb.0.log", 10),
        ("r3", "danaus-job-c.0.log", 0),
    ):
        (base / run).mkdir(parents=True)
        (base / run / file).write_text("x\n", encoding="utf-8")
        then = time.time() - age_s
        os.utime(base / run / file, (then, then))
    (base / "r4").mkdir()

    assert newest_run(tmp_path, "node/1") == base / "r2"
    assert newest_run(tmp_path, "elsewhere") is None
