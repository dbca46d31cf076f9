"""A stand-in for a job's agent, as its daemon sees it: settings on standard input, one answer, ended by signals.

Its job's name says how it behaves. It contains ``crash``, ``nonsense``, ``silent``, ``mute`` (closes its output),
``stubborn`` (ends only by SIGKILL), ``dies`` (with code 7 once it is up), ``orphans`` (starts a process that outlives
it), or nothing of that.

Run as a module with the arguments of ``danaus host``, it is that, with stand-ins for agents.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import msgpack

if TYPE_CHECKING:
    from collections.abc import Mapping

RECORD = "STAND_IN_RECORD"
"""Variable that names the file to which an agent adds a line for its start and one for its end."""
LIFE_S = 60.0
"""It ends by itself then, whatever has become of its test."""


def start_stand_in(env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """What a daemon calls in place of ``start_agent``."""
    return subprocess.Popen(
        [sys.executable, "-S", "-c", _PROGRAM, *sys.path],
        env={**os.environ, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


_PROGRAM = f"""
import sys, importlib.util
sys.path[:] = sys.argv[1:]
spec = importlib.util.spec_from_file_location("stand_in", {__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.be_agent()
"""


def be_agent() -> None:
    """Run as an agent."""
    settings: dict[str, Any] = msgpack.unpackb(sys.stdin.buffer.read())
    job = settings["job"]
    wake, woken = os.pipe()
    caught: list[int] = []

    def on_signal(signum: int, _frame: object) -> None:
        caught.append(signum)
        os.write(woken, b".")

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, on_signal)
    record("start", settings)
    if "orphans" in job:
        record("child", {"child": subprocess.Popen(["sleep", str(LIFE_S)], start_new_session=True).pid})
    if "crash" in job:
        print("stand-in: it crashes", file=sys.stderr)
        sys.exit(3)
    answer(settings)
    if "dies" in job:
        sys.exit(7)
    wait_end(wake, settings["daemon_pid"], is_stubborn="stubborn" in job)
    record("end", {"job": job, "signals": caught})


def answer(settings: dict[str, Any]) -> None:
    job = settings["job"]
    if "nonsense" in job:
        os.write(1, b"\xc1 this is no answer")
    elif "mute" in job:
        os.close(1)
    elif "silent" not in job:
        endpoint = f"tcp://{settings['advertise']}:{10000 + settings['slot']}"
        directory = os.environ.get("STAND_IN_DIRECTORY", "")
        os.write(1, msgpack.packb({"endpoint": endpoint, "pid": os.getpid(), "directory": directory}) or b"")


def wait_end(wake: int, daemon_pid: int, *, is_stubborn: bool) -> None:
    parent = os.pidfd_open(daemon_pid)
    deadline_s = time.monotonic() + LIFE_S
    while True:
        ready, _, _ = select.select([wake, parent], [], [], max(0.0, deadline_s - time.monotonic()))
        if wake not in ready:
            return
        os.read(wake, 100)
        if not is_stubborn:
            return


def record(event: str, fields: dict[str, Any]) -> None:
    path = os.environ.get(RECORD)
    if path:
        shown = {name: value.decode("latin-1") if isinstance(value, bytes) else value for name, value in fields.items()}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "pid": os.getpid(), **shown}) + "\n")


if __name__ == "__main__":
    from danaus.tools import host

    host.Daemon = functools.partial(host.Daemon, start=start_stand_in)  # pyright: ignore[reportAttributeAccessIssue]
    sys.exit(host.main(sys.argv[1:]))
