"""What two tools print about the threads of a process, read from real output."""

from __future__ import annotations

import faulthandler
import json
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest

from danaus.runtime.host import stacks
from danaus.runtime.host.stacks import Frame, Stacks, ThreadStack, parse_faulthandler, parse_py_spy

if TYPE_CHECKING:
    from pathlib import Path

IMPORTING = Frame("<frozen importlib._bootstrap_external>", 1233, "create_module")
CUDA = Frame("/site-packages/torch/cuda/__init__.py", 410, "_lazy_init")
WORK = Frame("/home/me/work.py", 7, "step")


def spied(*threads: dict[str, Any]) -> str:
    return json.dumps(
        [
            {
                "pid": 1,
                "thread_id": 140,
                "os_thread_id": 10 + index,
                "process_info": None,
                "thread_name": each.get("name"),
                "active": each.get("active", False),
                "owns_gil": each.get("owns_gil", False),
                "frames": [
                    {
                        "name": frame.function,
                        "filename": frame.file,
                        "line": frame.line,
                        "module": None,
                        "short_filename": None,
                        "locals": None,
                    }
                    for frame in each["frames"]
                ],
            }
            for index, each in enumerate(threads)
        ]
    )


PRINTED = """\
Thread 0x00007f471ce33700 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait
  File "/home/me/work.py", line 12 in rest

Current thread 0x00007f471d834740 (most recent call first):
  File "/home/me/work.py", line ??? in step
  File "<string>", line 1 in <module>
"""


def test_py_spy_names_threads_and_the_holder_of_the_lock_which_comes_first() -> None:
    text = spied(
        {"name": "danaus-io", "frames": [Frame("zmq.py", 3, "recv")]},
        {"name": "danaus-actor", "frames": [Frame("a.py", 1, "wait")]},
        {"name": "MainThread", "frames": [WORK, Frame("run.py", 2, "main")], "owns_gil": True},
    )

    found = parse_py_spy(text)

    assert [thread.name for thread in found.threads] == ["MainThread", "danaus-actor", "danaus-io"]
    assert found.gil_owner is not None
    assert str(found.gil_owner) == (
        "thread MainThread (holds the interpreter lock):\n"
        '  File "run.py", line 2, in main\n'
        '  File "/home/me/work.py", line 7, in step'
    )


def test_a_thread_without_a_name_goes_by_its_number() -> None:
    assert parse_py_spy(spied({"frames": []})).threads[0].name == "10"


@pytest.mark.parametrize("text", ["", "no such process", "{}", "[1]", '[{"frames": []}]', "null"])
def test_what_py_spy_does_not_print_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  JSON's errors are of this class too
        parse_py_spy(text)


def test_faulthandlers_threads_get_the_names_that_are_known() -> None:
    found = parse_faulthandler(PRINTED, {0x7F471D834740: "danaus-io"})

    assert [thread.name for thread in found.threads] == ["0x7f471ce33700", "danaus-io"]
    assert found.threads[0].frames == (
        Frame("/usr/lib/python3.11/threading.py", 331, "wait"),
        Frame("/home/me/work.py", 12, "rest"),
    )
    assert found.threads[1].frames == (Frame("/home/me/work.py", 0, "step"), Frame("<string>", 1, "<module>"))
    assert found.gil_owner is None


@pytest.mark.parametrize("text", ["", "\n\n", "Segmentation fault\n", '  File "a.py", line 1 in f\n'])
def test_what_faulthandler_does_not_print_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no stack"):
        parse_faulthandler(text, {})


def test_what_this_process_prints_is_understood(tmp_path: Path) -> None:
    names = {thread.ident or 0: thread.name for thread in threading.enumerate()}
    with (tmp_path / "stacks").open("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        found = parse_faulthandler(file.read(), names)

    main = next(thread for thread in found.threads if thread.name == "MainThread")
    assert main.frames[0].function == "test_what_this_process_prints_is_understood"


@pytest.mark.parametrize(("frame", "excuses"), [(IMPORTING, True), (CUDA, True), (WORK, False)])
def test_imports_and_the_start_of_cuda_excuse_silence_where_they_hold_the_lock(frame: Frame, excuses: bool) -> None:
    holder = {"name": "MainThread", "frames": [WORK, frame, WORK], "owns_gil": True}

    assert parse_py_spy(spied(holder)).excuses_silence is excuses


def test_an_import_of_a_thread_that_waits_for_the_lock_excuses_nothing() -> None:
    waiting = ThreadStack("a", (IMPORTING,), is_active=True)
    holder = ThreadStack("b", (WORK,), owns_gil=True)

    assert not Stacks((holder, waiting)).excuses_silence


def test_where_the_holder_is_not_known_every_active_thread_may_be_it() -> None:
    assert Stacks((ThreadStack("a", (IMPORTING,), is_active=True),)).excuses_silence
    assert not Stacks((ThreadStack("a", (IMPORTING,)), ThreadStack("b", (WORK,), is_active=True))).excuses_silence
    assert not Stacks(()).excuses_silence


def test_a_deep_stack_shows_its_inner_frames() -> None:
    text = str(ThreadStack("a", tuple(Frame("deep.py", line, "f") for line in range(100))))

    assert text.splitlines()[1] == "  (40 frames further out)"
    assert text.splitlines()[-1] == '  File "deep.py", line 0, in f'


def test_what_called_the_endpoint_is_left_out() -> None:
    frames = (WORK, Frame("/danaus/runtime/handler.py", 3, "CallHandler.run_sync"), Frame("runner.py", 1, "run"))

    assert str(ThreadStack("a", frames)) == 'thread a:\n  File "/home/me/work.py", line 7, in step'
    assert len(str(ThreadStack("a", frames[1:])).splitlines()) == 3


def test_of_a_thread_that_idles_in_the_runtime_the_innermost_frame_is_told() -> None:
    idle, outer = Frame(stacks.__file__, 9, "wait"), Frame("/usr/lib/python3.11/threading.py", 982, "Thread.run")

    assert str(ThreadStack("a", (idle, idle, outer))) == f'thread a:\n  File "{stacks.__file__}", line 9, in wait'
    assert str(ThreadStack("a", (WORK, outer))) == 'thread a:\n  File "/home/me/work.py", line 7, in step'


def test_the_signal_is_one_that_nothing_else_uses() -> None:
    assert signal.SIGRTMIN < stacks.STACK_SIGNAL < signal.SIGRTMAX
    assert signal.getsignal(stacks.STACK_SIGNAL) is signal.SIG_DFL
    assert not stacks.is_armed(1 << 22)


def test_states_of_processes_that_are_gone_are_empty() -> None:
    assert (stacks.read_state(1 << 22), stacks.read_status(1 << 22), stacks.is_traced(1 << 22)) == ("", {}, False)
