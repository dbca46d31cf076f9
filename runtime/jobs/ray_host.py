"""What a Ray actor of ours does on its node: runs ``danaus host`` as a child process, and ends with it.

Ray is imported by Ray itself before anything here runs, so nothing here needs the extra to be imported.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any, Final

from .errors import SHOWN_LINES
from .launch import HOST_MODULE

_LISTENS: Final = re.compile(rb"^danaus host: .* listens on (tcp://\S+)$", re.MULTILINE)
_HEAD_BYTES: Final = 4096
_TAIL_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Look:
    """How a host is."""

    node: str
    """Name and address of its machine."""
    address: str
    """Where its daemon listens, "" before."""
    code: int | None
    """The daemon's exit code, None while it runs."""
    last_lines: str
    """What it wrote, if it has ended."""


class RayHost:
    """One host: starts the daemon at once, without waiting until it listens.

    It keeps no named file on its node, since Ray ends actors by SIGKILL; the daemon follows it even then.

    Args:
        key: Text of the host key, which goes to the daemon through a pipe.
        name: Of the host.
        env: Variables that the daemon has besides those that Ray gave this actor.
    """

    def __init__(self, key: str, name: str, env: dict[str, str]) -> None:
        import ray

        self._ip: str = ray.util.get_node_ip_address()
        shown = f"[{self._ip}]" if ":" in self._ip else self._ip
        words = ["--listen", f"tcp://{shown}:0", "--key", "-", "--name", name, "--follow", str(os.getpid())]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  as long as the actor
        self._child = subprocess.Popen(  # noqa: S603  our own interpreter and module
            [sys.executable, "-m", HOST_MODULE, *words],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, **env},
            start_new_session=True,
        )
        pipe = self._child.stdin
        assert pipe is not None
        # It may have ended already, which look() tells.
        with contextlib.suppress(BrokenPipeError), pipe:
            pipe.write(key.encode())

    def look(self) -> Look:
        """Return how the daemon is."""
        code = self._child.poll()
        listens = _LISTENS.search(os.pread(self._log.fileno(), _HEAD_BYTES, 0))
        node = f"{os.uname().nodename} ({self._ip})"
        address = listens[1].decode() if listens else ""
        return Look(node, address, code, "" if code is None else self.last_lines(SHOWN_LINES))

    def last_lines(self, lines: int) -> str:
        """Return what the daemon wrote last."""
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def end(self, grace_s: float) -> None:
        """End the daemon: SIGTERM, then SIGKILL after ``grace_s``."""
        self._child.terminate()
        try:
            self._child.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def as_ray_actor(resources: dict[str, float], runtime_env: dict[str, Any], **options: Any) -> Any:
    """Return :class:`RayHost` as a class of Ray's.

    Args:
        resources: What an actor takes from its node.
        runtime_env: As Ray takes it; may be empty.
        **options: Further options of Ray's.
    """
    import ray

    amounts = dict(resources)
    options |= {"num_cpus": amounts.pop("CPU", 0), "num_gpus": amounts.pop("GPU", 0)}
    if "memory" in amounts:
        options["memory"] = amounts.pop("memory")
    if runtime_env:
        options["runtime_env"] = runtime_env
    return ray.remote(RayHost).options(resources=amounts, max_restarts=0, lifetime="detached", **options)
