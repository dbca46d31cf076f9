"""The `danaus` command and `danaus run`, which must lack nothing that plain Python has."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import danaus
from danaus.tools import cli, run

LOOK = """
import sys, os, threading, atexit
assert __name__ == "__main__" and sys.modules["__main__"].__dict__ is globals()
print(sys.argv, os.path.basename(__file__), os.path.basename(sys.path[0]) or ".", __spec__, __doc__, __package__)
"""


def start(*arguments: object, cwd: Path, python: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *([] if python else ["-m", "danaus.tools.cli", "run"]), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=15, stdin=subprocess.DEVNULL, check=False
    )


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_version_names_what_a_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])

    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"danaus {danaus.__version__} (Python 3.")


def test_without_a_command_it_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2

    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)


def test_an_unknown_command_is_answered_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["brench"])

    assert ended.value.code == 2
    assert "'bench', 'doctor', 'host', 'job', 'key', 'run'" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_options_after_the_command_are_the_commands_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main([name, "--help"])
    except SystemExit as ended:
        code = ended.code

    assert code == 0
    assert f"danaus {name}" in capsys.readouterr().out


def test_help_imports_no_command() -> None:
    code = "import sys\nfrom danaus.tools import cli\ncli.main([])\nassert 'danaus.tools.doctor' not in sys.modules"

    subprocess.run([sys.executable, "-c", code], check=True, timeout=15, stdout=subprocess.DEVNULL)


def test_a_script_finds_itself_as_under_plain_python(tmp_path: Path) -> None:
    script = write(tmp_path / "script.py", LOOK)

    ours = start(script, "--flag", "-m", "x y", cwd=tmp_path)
    plain = start(script, "--flag", "-m", "x y", cwd=tmp_path, python=True)

    assert ours.stdout == plain.stdout != ""
    assert (ours.returncode, ours.stderr) == (plain.returncode, plain.stderr)


@pytest.mark.parametrize("kind", ["folder", "zip", "module"])
def test_folders_archives_and_modules_run_as_under_plain_python(kind: str, tmp_path: Path) -> None:
    body = "import sys\nprint(__name__, sys.argv[1:], __package__)\n"
    (tmp_path / "app").mkdir()
    write(tmp_path / "app" / "__main__.py", body)
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.writestr("__main__.py", body)
    arguments = {"folder": ["app", "1"], "zip": ["app.zip", "1"], "module": ["-m", "app", "1"]}[kind]

    ours = start(*arguments, cwd=tmp_path)
    plain = start(*arguments, cwd=tmp_path, python=True)

    assert ours.stdout == plain.stdout != ""


@pytest.mark.parametrize(
    "text",
    [
        "import sys; sys.exit(3)",
        "raise SystemExit('a reason')",
        "import atexit\nx = 7\natexit.register(lambda: print('at exit', x))",
        "import threading, time\nx = 7\ndef late():\n    threading.main_thread().join(0.2); print(x)\n"
        "threading.Thread(target=late).start()",
        "import pickle\nclass A: pass\nprint(pickle.loads(pickle.dumps(A())).__class__.__module__)",
        "import sys\nsys.excepthook = lambda *found: print('hook', found[0].__name__)\n1 / 0",
        "def f():\n    1 / 0\nf()",
        "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
    ],
    ids=["exit-code", "exit-message", "exit-hook", "thread", "pickle", "excepthook", "traceback", "signal"],
)
def test_a_script_ends_as_under_plain_python(text: str, tmp_path: Path) -> None:
    script = write(tmp_path / "script.py", text)

    ours, plain = start(script, cwd=tmp_path), start(script, cwd=tmp_path, python=True)

    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_a_script_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = start("nowhere.py", cwd=tmp_path)

    assert done.returncode == 1
    assert done.stderr == "danaus run: cannot open 'nowhere.py': No such file or directory\n"


ACTOR_ERROR = '''
from danaus import ActorError

def train():
    raise ActorError("trainers[dp=1].step", ValueError("bad batch"), """Traceback (most recent call last):
  File "step.py", line 7, in step
ValueError: bad batch""")

train()
'''


def test_an_error_of_the_runtime_is_told_in_a_few_lines(tmp_path: Path) -> None:
    script = write(tmp_path / "script.py", ACTOR_ERROR)

    done = start(script, cwd=tmp_path)

    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0] == "ActorError: trainers[dp=1].step raised ValueError: bad batch"
    assert lines[1:5] == [f"  {script}:9 in <module>", "    train()", f"  {script}:5 in train", lines[4]]
    assert '  File "step.py", line 7, in step' in lines
    assert "The above exception" not in done.stderr


def test_every_frame_is_shown_on_request(tmp_path: Path) -> None:
    script = write(tmp_path / "script.py", ACTOR_ERROR)

    done = start("--traceback", script, cwd=tmp_path)

    assert done.returncode == 1
    assert "Traceback (most recent call last):" in done.stderr
    assert "run.py" not in done.stderr


def test_frames_of_the_runtime_are_left_out_of_a_report() -> None:
    with pytest.raises(IndexError) as caught:
        danaus.Extent.of(a=1).point(a=9)

    text = run.describe(danaus.CallTimeoutError("a.f", 1.0, ("dp=0",)), caught.tb)

    assert text.startswith("CallTimeoutError: a.f: no reply within 1 s")
    assert __file__ in text
    assert f"{Path(danaus.__file__).parent}/runtime" not in text


@pytest.mark.timeout(40)
def test_a_real_failure_reads_well_from_end_to_end(tmp_path: Path) -> None:
    script = write(
        tmp_path / "script.py",
        """
from danaus import Actor, endpoint, this_host

class Bad(Actor):
    @endpoint
    def step(self):
        raise ValueError("bad batch")

with this_host().spawn_procs({"dp": 1}) as procs:
    procs.spawn("bad", Bad).step.call().get(timeout=15)
""",
    )

    done = start(script, cwd=tmp_path)

    assert done.returncode == 1
    assert "raised ValueError: bad batch" in done.stderr.splitlines()[0]
    assert "in step" in done.stderr
    assert "runtime/future.py" not in done.stderr
