"""`danaus job`: jobs from files, their state, their end; what reaches hosts is in ``test_job_remote.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import danaus
from danaus.runtime.jobs import HostRecord, JobState
from danaus.tools import job as job_tool
from danaus.tools.job_view import show_state

if TYPE_CHECKING:
    from danaus.runtime.jobs.local_job import LocalJob

LIMIT_S = 60.0
pytestmark = pytest.mark.timeout(2 * LIMIT_S)


def test_a_running_job_is_shown_by_name(running: LocalJob, capsys: pytest.CaptureFixture[str]) -> None:
    assert job_tool.main(["state", "train"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "job train, local: running, 2 of 2 hosts listen"
    assert lines[1].split() == ["host", "status", "address", "name", "detail"]
    assert lines[3].split()[:2] == ["1", "running"]


def test_state_and_hosts_can_be_read_by_programs(running: LocalJob, capsys: pytest.CaptureFixture[str]) -> None:
    assert job_tool.main(["state", "--json"]) == 0
    [state] = json.loads(capsys.readouterr().out)
    assert job_tool.main(["hosts", "train"]) == 0

    assert capsys.readouterr().out.splitlines() == [host["address"] for host in state["hosts"]]


def test_the_key_is_never_shown(running: LocalJob, capsys: pytest.CaptureFixture[str]) -> None:
    key = Path(running.key_file()).read_text(encoding="utf-8").strip()
    for words in (
        ["state", "--json"],
        ["state", "train"],
        ["hosts", "train"],
        ["render", "train"],
        ["logs", "train", "--daemon"],
    ):
        assert job_tool.main(words) == 0

    assert key not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["exec", "train", "--host", "7", "--", "ls"], "job 'train' has no host 7: expected 0 to 1"),
        (["exec", "tarin", "--", "ls"], "no job 'tarin' was started from this machine by this user; there are: train"),
    ],
)
def test_wrong_names_are_told_with_the_right_ones(
    running: LocalJob, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job_tool.main(words) == 1

    assert said in capsys.readouterr().err


def test_a_record_that_cannot_be_read_does_not_hide_other_jobs(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = alone / "state" / "jobs"
    folder.mkdir(parents=True, mode=0o700)
    for name in ("one", "two"):
        (folder / f"{name}.json").write_text("{}", encoding="utf-8")

    assert job_tool.main(["state"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["job", "one", "two"]
    assert "cannot be looked at: " in lines[1]
    assert job_tool.main(["state", "one"]) == 1


def test_a_job_is_applied_twice_and_killed_once(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (alone / "job.yaml").write_text("kind: local\nhosts: 2\nname: mine\ndetached: true\n", encoding="utf-8")
    try:
        assert job_tool.main(["apply", "job.yaml", "--wait"]) == 0
        first = capsys.readouterr()
        assert "job mine: 2 of 2 hosts listen" in first.err
        assert job_tool.main(["apply", "job.yaml"]) == 0
        assert capsys.readouterr().out == first.out
    finally:
        assert job_tool.main(["kill", "job.yaml"]) == 0
    assert job_tool.main(["kill", "job.yaml"]) == 0
    assert job_tool.main(["state", "job.yaml"]) == 1
    assert capsys.readouterr().out.startswith(
        "job mine: has ended\njob mine: did not run\njob mine, local: ended (not started)"
    )


def test_hosts_that_would_end_with_the_command_are_refused(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (alone / "job.yaml").write_text("kind: local\nhosts: 2\n", encoding="utf-8")

    assert job_tool.main(["apply", "job.yaml"]) == 1
    assert "write `detached: true`" in capsys.readouterr().err
    assert job_tool.main(["state"]) == 0


def test_render_prints_manifests_without_the_key(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (alone / "job.yaml").write_text("kind: kubernetes\nname: train\nimage: x:1\nhosts: 4\n", encoding="utf-8")

    assert job_tool.main(["render", "job.yaml"]) == 0
    text = capsys.readouterr().out
    assert "key: <redacted>" in text
    assert "completions: 4" in text


def test_render_fills_in_a_key_for_kubernetes_only(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (alone / "job.yaml").write_text("kind: local\n", encoding="utf-8")

    assert job_tool.main(["render", "job.yaml", "--key", "key"]) == 1
    assert "--key fills in the Secret of a kubernetes job" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["exec", "train"], ["state", "--", "ls"], ["aply", "x"], ["shell"], ["logs", "a", "--lines", "x"]]
)
def test_a_wrong_call_is_answered_with_the_usage(
    alone: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        job_tool.main(words)

    assert ended.value.code == 2
    assert "usage: danaus job" in capsys.readouterr().err


def test_a_file_without_the_right_suffix_is_told(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (alone / "job").write_text("kind: local\n", encoding="utf-8")

    assert job_tool.main(["apply", "job"]) == 1
    assert "a job file ends in .yaml, .yml or .py" in capsys.readouterr().err


def test_a_table_has_one_line_per_host(capsys: pytest.CaptureFixture[str]) -> None:
    hosts = (
        HostRecord(0, "node1", "tcp://10.0.0.1:1", "running"),
        HostRecord(1, "node2", "", "ended", "it ended with code 1\nlast words"),
    )

    show_state(JobState("train", "ssh", "pending", hosts, "two lines"))

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "job train, ssh: pending, 1 of 2 hosts listen (two lines)"
    assert lines[3] == "1     ended    -                 node2  it ended with code 1 last words"


def test_the_tool_is_cheap_to_load() -> None:
    names = ", ".join(f"{name}=None" for name in ("torch", "numpy", "rich", "ray", "yaml"))
    code = f"import sys; sys.modules.update({names}); import danaus.tools.job"

    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=15)
    assert danaus.__version__
