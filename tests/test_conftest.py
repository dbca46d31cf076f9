"""The rules that hold for every test, tried on runs of pytest that break them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RunPytest = Callable[[str], tuple[int, str]]

CONFTEST = Path(__file__).with_name("conftest.py").read_text(encoding="utf-8").replace("GRACE_S = 3.0", "GRACE_S = 0.3")

ACTOR = """
import pytest
from danaus import Actor, endpoint, this_host

class Echo(Actor):
    @endpoint
    def echo(self, x):
        return x
"""


@pytest.fixture
def run_pytest(tmp_path: Path) -> RunPytest:
    """Return a function that runs a test file under a copy of the conftest; gives the exit code and the output."""

    def run(text: str) -> tuple[int, str]:
        (tmp_path / "conftest.py").write_text(CONFTEST, encoding="utf-8")
        (tmp_path / "test_inner.py").write_text(text, encoding="utf-8")
        marks = ["-o", "markers=torch: needs torch\ngpu: needs a GPU"]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--import-mode=importlib", *marks]
        done = subprocess.run(
            [*command, f"--rootdir={tmp_path}", tmp_path],
            capture_output=True,
            text=True,
            timeout=18,
            cwd=tmp_path,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (
            "import threading\ndef test_x():\n    threading.Thread(target=threading.Event().wait, args=(2,), "
            "name='forgotten').start()\n",
            "thread 'forgotten'",
        ),
        (
            "import subprocess\nkept = []\ndef test_x():\n    kept.append(subprocess.Popen(['sleep', '60']))\n",
            "sleep 60",
        ),
        ("import subprocess\ndef test_x():\n    subprocess.run(['sh', '-c', 'sleep 61 &'], check=True)\n", "sleep 61"),
        ("import zmq\nkept = []\ndef test_x():\n    kept.append(zmq.Context().socket(zmq.PAIR))\n", "thread 'ZMQbg"),
        (
            "import os\ndef test_x():\n    os.mkdir(os.environ['DANAUS_SOCKET_DIR'] + '/danaus-job')\n",
            "/danaus-job",
        ),
        (
            f"{ACTOR}\nkept = []\ndef test_x():\n    kept.append(this_host().spawn_procs({{'dp': 1}}, name='kept'))\n"
            "    kept[0].spawn('echo', Echo).echo.call(1).get(timeout=10)\n",
            "'kept",
        ),
    ],
    ids=["thread", "child", "orphan", "zmq", "directory", "mesh"],
)
def test_what_a_test_leaves_behind_fails_it(text: str, left: str, run_pytest: RunPytest) -> None:
    code, out = run_pytest(text)

    assert code == 1
    assert "this test left behind:" in out
    assert left in out
    assert "1 passed, 1 error" in out, "the next tests must not be blamed"


def test_a_mesh_may_be_shared_by_the_tests_of_a_module(run_pytest: RunPytest) -> None:
    text = f"""{ACTOR}
@pytest.fixture(scope="module")
def echo():
    with this_host().spawn_procs({{"dp": 2}}) as procs:
        yield procs.spawn("echo", Echo)

def test_first(echo):
    echo.echo.call(1).get(timeout=10)

def test_second_with_a_mesh_of_its_own(echo):
    with this_host().spawn_procs({{"dp": 1}}) as procs:
        procs.spawn("other", Echo).echo.call(1).get(timeout=10)
"""
    code, out = run_pytest(text)

    assert (code, "2 passed" in out) == (0, True), out


def test_skips_are_counted_by_marker(run_pytest: RunPytest) -> None:
    text = "import pytest\n@pytest.mark.skip(reason='later')\ndef test_a(): pass\ndef test_b(): pass\n"

    code, out = run_pytest(text)

    assert code == 0
    assert "no marker: 1 (Skipped: later)" in out


@pytest.mark.torch
def test_a_skip_of_what_the_machine_has_fails_the_run(run_pytest: RunPytest) -> None:
    text = "import pytest\n@pytest.mark.torch\ndef test_a():\n    pytest.skip('not today')\n"

    code, out = run_pytest(text)

    assert code == 1
    assert "torch: 1 (Skipped: not today)" in out
    assert "was skipped, though `danaus doctor` finds: torch" in out
