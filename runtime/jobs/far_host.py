"""What an SSHJob runs on a host: starts its daemon, looks at it, ends it. Answers by one line of JSON on its output.

    python -m danaus.runtime.jobs.far_host start --name NAME [--address ADDRESS] [--port PORT]    (the key on its input)
    python -m danaus.runtime.jobs.far_host look|stop|logs --directory DIRECTORY [--pid PID --start-ticks N] [--lines N]

The daemon outlives this command and its connection. The key goes from pipe to pipe: no file of the host ever holds it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .launch import host_arguments, read_ready, tail
from .processes import Known, end_all, known

if TYPE_CHECKING:
    from collections.abc import Sequence

MARK: Final = "danaus-far-host "
"""Starts the line that holds the answer: what a login shell prints may come before it."""
START_LIMIT_S: Final = 45.0
END_GRACE_S: Final = 15.0
POLL_S: Final = 0.02
MAX_KEY_BYTES: Final = 4096
SHOWN_LINES: Final = 12
_PREFIX: Final = "danaus-far-host-"


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(prog="far_host")
    parser.add_argument("action", choices=["start", "look", "stop", "logs"])
    parser.add_argument("--name", default="host")
    parser.add_argument("--address", default="")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--pid", type=int, default=0)
    parser.add_argument("--start-ticks", type=int, default=0)
    parser.add_argument("--directory", default="")
    parser.add_argument("--lines", type=int, default=SHOWN_LINES)
    options = parser.parse_args(arguments)
    if options.action == "start":
        return _start(options.name, options.address or own_address(), options.port)
    directory, process = _checked(options.directory), Known(options.pid, options.start_ticks)
    if options.action == "stop":
        left = end_all([process], grace_s=END_GRACE_S)
        shutil.rmtree(directory, ignore_errors=True)
        return _answer({"left": [process.pid for process in left]})
    if options.action == "look":
        return _answer({"alive": process.is_alive(), "lines": tail(directory / "log", SHOWN_LINES)})
    return _answer({"lines": tail(directory / "log", options.lines)})


def own_address() -> str:
    """The address of this machine by which its caller reached it, as sshd tells; loopback without one."""
    fields = os.environ.get("SSH_CONNECTION", "").split()
    return fields[2] if len(fields) == 4 else "127.0.0.1"


def _start(name: str, address: str, port: int) -> int:
    key = sys.stdin.buffer.read(MAX_KEY_BYTES)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
    bracketed = f"[{address}]" if ":" in address else address
    ready_file = str(directory / "ready")
    arguments = host_arguments(listen=f"tcp://{bracketed}:{port}", key="-", name=name, ready_file=ready_file)
    with (directory / "log").open("wb") as log:
        daemon = subprocess.Popen(  # noqa: S603  our own interpreter and module
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    process = known(daemon.pid)
    is_told = False
    try:
        _hand_over(key, daemon)
        reached = _wait_ready(daemon, directory)
        if reached:
            notes = {"pid": process.pid, "start_ticks": process.start_ticks, "directory": str(directory)}
            _answer({**notes, "address": reached})
            is_told = True
            return 0
        sys.stderr.write(f"danaus host: {_why(daemon)}\n{tail(directory / 'log', SHOWN_LINES)}\n")
        return 1
    finally:
        # Nobody would know of it.
        if not is_told:
            end_all([process], grace_s=1.0)
            shutil.rmtree(directory, ignore_errors=True)


def _hand_over(key: bytes, daemon: subprocess.Popen[bytes]) -> None:
    assert daemon.stdin is not None
    # A daemon that ended has said why.
    with contextlib.suppress(BrokenPipeError):
        daemon.stdin.write(key)
        daemon.stdin.close()


def _wait_ready(daemon: subprocess.Popen[bytes], directory: Path) -> str:
    """Return the address that the daemon listens on, "" if it ended or took too long."""
    deadline_s = time.monotonic() + START_LIMIT_S
    while daemon.poll() is None and time.monotonic() < deadline_s:
        address = read_ready(directory / "ready")
        if address:
            return address
        time.sleep(POLL_S)
    return ""


def _why(daemon: subprocess.Popen[bytes]) -> str:
    code = daemon.poll()
    return f"did not listen within {START_LIMIT_S:g} s" if code is None else f"ended with code {code}"


def _checked(directory: str) -> Path:
    """Refuse to remove anything but a directory of ours."""
    path = Path(directory)
    if not path.is_absolute() or not path.name.startswith(_PREFIX):
        raise SystemExit(f"far_host: {directory!r} is no directory that `start` has made")
    return path


def _answer(fields: dict[str, Any]) -> int:
    # Raises if the caller has gone, who then could not know of what was started.
    sys.stdout.write(f"{MARK}{json.dumps(fields)}\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
