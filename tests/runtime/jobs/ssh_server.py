"""A real sshd of this user's on a free port of 127.0.0.1, with its own host key and one user key."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

INSTALL = "apt-get install openssh-server openssh-client"
LIMIT_S = 10.0

CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/user_key.pub
PidFile {directory}/sshd.pid
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 64
"""


@dataclass(frozen=True, slots=True)
class SSHServer:
    """How to reach it."""

    port: int
    identity: str
    options: tuple[str, ...]
    log: Path


def missing_programs() -> str | None:
    """What to install, None if nothing lacks."""
    needed = ("sshd", "ssh", "ssh-keygen")
    lacking = [name for name in needed if _find(name) is None]
    return f"no {', '.join(lacking)}: {INSTALL}" if lacking else None


@contextlib.contextmanager
def ssh_server(directory: Path) -> Generator[SSHServer]:
    for name in ("host_key", "user_key"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
        subprocess.run(keygen, check=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL)
    if os.getuid() == 0:
        # Where it is root, sshd wants this for its unprivileged part.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    port = _free_port()
    config, log = directory / "sshd_config", directory / "sshd.log"
    config.write_text(CONFIG.format(port=port, directory=directory), encoding="utf-8")
    sshd = subprocess.Popen(
        [_find("sshd") or "sshd", "-D", "-f", str(config), "-E", str(log)], stdin=subprocess.DEVNULL
    )
    try:
        _wait_listening(sshd, port, log)
        (directory / "known_hosts").write_text("", encoding="utf-8")
        options = (f"UserKnownHostsFile={directory}/known_hosts", "StrictHostKeyChecking=accept-new", "LogLevel=ERROR")
        yield SSHServer(port, str(directory / "user_key"), options, log)
    finally:
        sshd.terminate()
        sshd.wait(LIMIT_S)


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_listening(sshd: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        if sshd.poll() is not None or time.monotonic() > deadline_s:
            raise AssertionError(f"sshd does not listen: {log.read_text(encoding='utf-8')}")
        time.sleep(0.01)
