"""A job's agent as its daemon holds it: started, told its settings on its standard input, heard once on the output.

No secret is in the child's command line or environment, where others on the host could read it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgpack

from ..host import interpreter
from ..host.descendants import end_descendants

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    StartChild: TypeAlias = Callable[[Mapping[str, str]], subprocess.Popen[bytes]]
    """Starts an agent's process with pipes for standard input and output, given variables for its environment."""

_MAX_ANSWER_BYTES: Final = 4096
_pack = msgpack.Packer(autoreset=True).pack
_PIPE_BYTES: Final = 65536
"""What a fresh pipe takes at once: the settings are written without waiting for the child to read."""


def start_agent(env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the real one."""
    return interpreter.start(
        "danaus.runtime.host.agent_main",
        "--job",
        env=env,
        # A Ctrl-C in the daemon's terminal is for the daemon, which tells its agents.
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """What an agent says of itself once it listens.

    Attributes:
        endpoint: Where it can be reached.
        pid: Its process.
        directory: Its socket directory, to be removed where it is killed; empty if unknown.
    """

    endpoint: str
    pid: int
    directory: str = ""


class JobProcess:
    """One agent's process.

    Attributes:
        pidfd: Readable when it has ended.
        answer_fd: Readable when it says something, -1 when it is listened to no more.
        has_said_all: It has answered, or closed its output.
    """

    def __init__(self, child: subprocess.Popen[bytes], settings: Mapping[str, Any]) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        self._child = child
        self.pid = child.pid
        try:
            self.pidfd = os.pidfd_open(child.pid)
        except OSError:
            with child:
                child.kill()
            raise
        self._stdout = child.stdout
        self.answer_fd = child.stdout.fileno()
        os.set_blocking(self.answer_fd, False)
        self._said = b""
        self.has_said_all = False
        self._directory = ""
        data = _pack(dict(settings))
        assert len(data) <= _PIPE_BYTES
        # Where it has ended already, that is told by its pidfd.
        with contextlib.suppress(BrokenPipeError), child.stdin:
            os.write(child.stdin.fileno(), data)

    def read_answer(self) -> Answer | None:
        """Read what there is; return the whole answer once, None until then.

        Raises:
            ValueError: It is none.
        """
        try:
            data = os.read(self.answer_fd, _MAX_ANSWER_BYTES)
        except BlockingIOError:
            return None
        self._said += data
        answer = _parse(self._said)
        if answer is not None:
            self._directory = answer.directory
        self.has_said_all = answer is not None or not data
        return answer

    def stop_reading(self) -> None:
        """Listen to it no more."""
        self.answer_fd = -1
        self._stdout.close()

    def send_signal(self, signum: int) -> None:
        """Send it a signal, if it still lives."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signum)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)

    def has_ended(self) -> bool:
        """Whether it has."""
        return os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def reap(self) -> int:
        """Return its exit code, a signal's number negated; it has ended. What a killed one left behind is removed."""
        code = self._child.wait()
        os.close(self.pidfd)
        self.stop_reading()
        if code != 0 and self._directory:
            end_descendants(self._directory)
            _remove_private(self._directory)
        return code


def _parse(data: bytes) -> Answer | None:
    unpacker = msgpack.Unpacker(max_buffer_size=_MAX_ANSWER_BYTES, strict_map_key=True)
    try:
        unpacker.feed(data)
        fields: Any = unpacker.unpack()
    except msgpack.OutOfData:
        return None
    except (msgpack.UnpackException, ValueError, TypeError):
        raise ValueError("its agent's answer is malformed") from None
    if type(fields) is not dict:
        raise ValueError("its agent's answer is no map")
    endpoint: Any
    endpoint, pid, directory = fields.get("endpoint"), fields.get("pid"), fields.get("directory", "")
    is_right = type(endpoint) is str and endpoint.startswith("tcp://") and len(endpoint) <= 512
    if not is_right or type(pid) is not int or type(directory) is not str:
        raise ValueError("its agent's answer names no endpoint or pid")
    return Answer(endpoint, pid, directory)


def _remove_private(directory: str) -> None:
    """Remove a directory that only this user can enter; anything else was not made by an agent."""
    with contextlib.suppress(OSError):
        status = os.lstat(directory)
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077:
            shutil.rmtree(directory, ignore_errors=True)
