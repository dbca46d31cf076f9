"""What processes write, seen from the terminal of a real controller script, and in the files that are kept of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

PRELUDE = """
import logging, os, sys, time
from danaus import Actor, SupervisionError, endpoint, this_host


class Writer(Actor):
    @endpoint
    def say(self, *lines):
        for line in lines:
            print(line)

    @endpoint
    def say_rank(self, template):
        from danaus import current_rank
        print(template.format(current_rank().rank))

    @endpoint
    def err(self, line):
        sys.stderr.write(line + "\\n")

    @endpoint
    def log(self, level, text):
        logging.getLogger("my.module").log(level, text)

    @endpoint
    def raw(self, data):
        os.write(1, data)

    @endpoint
    def count(self, number):
        for each in range(number):
            print("line", each)

    @endpoint
    def shell(self, command):
        return os.system(command)

    @endpoint
    def die(self, *lines):
        for line in lines:
            print(line)
        sys.stdout.write("unfinished")
        sys.stdout.flush()
        os.kill(os.getpid(), 9)


def start(ranks, name="crew", **options):
    procs = this_host().spawn_procs({"rank": ranks}, name=name, **options)
    return procs, procs.spawn("writer", Writer)
"""


@dataclass(frozen=True, slots=True)
class Output:
    """What a script and its processes left."""

    stdout: str
    stderr: str
    files: dict[str, str]
    """Per-rank files by name."""


@pytest.fixture
def run(tmp_path: Path):
    def run(body: str, *, code: int = 0) -> Output:
        script, logs = tmp_path / "controller.py", tmp_path / "logs"
        script.write_text(PRELUDE + body)
        env = {**os.environ, "DANAUS_LOG_DIR": str(logs)}
        done = subprocess.run(
            [sys.executable, "-W", "error", str(script)],
            env=env,
            capture_output=True,
            text=True,
            timeout=18,
            check=False,
        )
        assert done.returncode == code, done.stderr
        [job] = logs.iterdir()
        assert (job.stat().st_mode & 0o777, {path.stat().st_mode & 0o777 for path in job.iterdir()}) == (0o700, {0o600})
        files = {re.sub(r"-[0-9a-f]+\.", ".", path.name): path.read_text() for path in job.iterdir()}
        return Output(done.stdout, done.stderr, files)

    return run


def test_stdout_stderr_and_logging_reach_the_script_with_mesh_and_rank(run) -> None:
    output = run("""
procs, writer = start(2)
one = writer.slice(rank=1)
one.say.call_one("to stdout").get(timeout=10)
one.err.call_one("to stderr").get(timeout=10)
one.log.call_one(logging.INFO, "an info").get(timeout=10)
one.log.call_one(logging.WARNING, "a warning").get(timeout=10)
one.log.call_one(logging.DEBUG, "a detail").get(timeout=10)
procs.stop().get(timeout=10)
""")

    assert output.stdout == "[crew 1] to stdout\n"
    lines = output.stderr.splitlines()
    assert lines == ["[crew 1] to stderr", "[crew 1] INFO my.module: an info", "[crew 1] WARNING my.module: a warning"]


def test_equal_lines_of_many_ranks_collapse_with_a_count_and_others_do_not(run) -> None:
    output = run("""
procs, writer = start(4)
writer.say.call("the same").get(timeout=10)
writer.say_rank.call("mine is {}").get(timeout=10)
procs.stop().get(timeout=10)
""")

    lines = output.stdout.splitlines()
    assert lines.count("[crew 0-3] the same (x4)") == 1
    assert sorted(lines[1:]) == [f"[crew {rank}] mine is {rank}" for rank in range(4)]


def test_every_line_is_there_at_the_exit_in_order_and_in_the_files(run) -> None:
    output = run("""
procs, writer = start(2)
writer.slice(rank=0).count.call_one(20_000).get(timeout=10)
writer.slice(rank=1).say.call_one("last words").get(timeout=10)
""")

    expected = [f"line {number}" for number in range(20_000)]
    assert [line for line in output.stdout.splitlines() if "line" in line] == [f"[crew 0] {line}" for line in expected]
    assert "[crew 1] last words" in output.stdout
    assert output.files["crew.0.log"].splitlines() == expected
    assert output.files["crew.1.log"] == "last words\n"


def test_every_line_is_there_after_a_crash_even_an_unfinished_one(run) -> None:
    output = run("""
procs, writer = start(1)
error = writer.slice(rank=0).die.call_one("first", "second").exception(timeout=10)
assert error.failure.log_tail == ("first", "second", "unfinished"), error.failure
""")

    assert output.stdout.splitlines() == ["[crew 0] first", "[crew 0] second", "[crew 0] unfinished"]
    assert output.files["crew.0.log"] == "first\nsecond\nunfinished\n"
    assert "mesh 'crew' rank 0" in output.stderr
    assert "SIGKILL" in output.stderr


def test_lines_written_below_python_are_caught_too(run) -> None:
    output = run(r"""
procs, writer = start(1)
one = writer.slice(rank=0)
one.raw.call_one(b"from write(2)\nbad \xff byte\n").get(timeout=10)
assert one.shell.call_one("echo from a child; echo to stderr >&2").get(timeout=10) == 0
one.raw.call_one(b"\rprogress 1\rprogress 2\n").get(timeout=10)
""")

    assert output.stdout.splitlines() == [
        "[crew 0] from write(2)",
        "[crew 0] bad \N{REPLACEMENT CHARACTER} byte",
        "[crew 0] from a child",
        "[crew 0] progress 2",
    ]
    assert output.stderr == "[crew 0] to stderr\n"


def test_output_can_be_switched_off_and_on_at_any_time_and_the_files_keep_all(run) -> None:
    output = run("""
procs, writer = start(1)
other_procs, other = start(1, name="other")
one = writer.slice(rank=0)
one.say.call_one("seen").get(timeout=10)
procs.logging_option(stream_to_client=False)
one.say.call_one("hidden").get(timeout=10)
other.say.call("seen of others").get(timeout=10)
# The lines of a process arrive in order, its stop after them.
procs.logging_option(stream_to_client=False, level="ERROR")
one.log.call_one(logging.WARNING, "hidden by its level").get(timeout=10)
procs.stop().get(timeout=10)
""")

    lines = output.stdout.splitlines()
    assert "[crew 0] hidden" not in lines
    assert "[other 0] seen of others" in lines
    assert output.files["crew.0.log"] == "seen\nhidden\n"


def test_level_can_be_raised_and_lowered_while_they_run(run) -> None:
    output = run("""
procs, writer = start(1)
one = writer.slice(rank=0)
procs.logging_option(level=logging.ERROR)
one.log.call_one(logging.WARNING, "too quiet").get(timeout=10)
procs.logging_option(level="DEBUG")
one.log.call_one(logging.DEBUG, "now heard").get(timeout=10)
procs.stop().get(timeout=10)
for bad in ({"level": "LOUD"}, {"aggregate_window_sec": -1}):
    try:
        procs.logging_option(**bad)
    except ValueError:
        continue
    raise AssertionError(bad)
""")

    assert output.stderr == "[crew 0] DEBUG my.module: now heard\n"


def test_window_of_none_prints_each_line_by_itself(run) -> None:
    output = run("""
procs, writer = start(2)
procs.initialized.get(timeout=10)
procs.logging_option(aggregate_window_sec=None)
writer.say.call("the same").get(timeout=10)
procs.stop().get(timeout=10)
""")

    assert sorted(output.stdout.splitlines()) == ["[crew 0] the same", "[crew 1] the same"]


def test_two_meshes_of_one_name_do_not_mix_their_ranks(run) -> None:
    output = run("""
first_procs, first = start(1)
second_procs, second = start(1)
first.say.call("of the first").get(timeout=10)
second.say.call("of the second").get(timeout=10)
""")

    assert sorted(output.stdout.splitlines()) == ["[crew 0] of the first", "[crew 0] of the second"]


def test_writing_a_lot_neither_blocks_the_actor_nor_loses_the_call(run) -> None:
    # The terminal reads nothing until the script has ended: 8 MB are more than any pipe holds.
    output = run("""
procs, writer = start(1)
one = writer.slice(rank=0)
one.say.call_one(*["x" * 4000] * 2000).get(timeout=15)
""")

    assert output.files["crew.0.log"].count("\n") == 2000
    assert output.stdout.count("\n") == 2000
