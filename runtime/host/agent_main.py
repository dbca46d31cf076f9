"""Starts a host agent: the controller's own, or, with ``--job``, one that a host's daemon has been asked for."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import socket
import tempfile

from ..config import socket_root
from ..messages import wire
from .agent import Agent
from .descendants import JOB_VARIABLE
from .kernel import adopt_orphans
from .log_files import new_log_directory
from .settings import read_settings
from .sweep import own, sweep


def main(argv: list[str]) -> None:
    """Run an agent: ``DIRECTORY CONTROLLER_PID HOST LOG_DIRECTORY``, or ``--job`` with the rest on standard input."""
    settings, answer_fd = None, -1
    if argv == ["--job"]:
        settings = read_settings()
        directory = os.environ[JOB_VARIABLE] = tempfile.mkdtemp(prefix="danaus-", dir=socket_root())
        parent_pid, host = settings.daemon_pid, settings.host
        log_directory = new_log_directory(settings.log_root, settings.host)
        # Nothing but the answer goes to the daemon; kept open, since what is opened next would get the number.
        answer_fd = os.dup(1)
        os.dup2(2, 1)
    else:
        directory, parent, host, log_directory = argv
        parent_pid = int(parent)
    parent_fd = _open_parent(parent_pid)
    if parent_fd is None:
        # It was killed while this process started.
        shutil.rmtree(directory, ignore_errors=True)
        return
    own(directory)
    adopt_orphans()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent_pid = os.getpid()
    # Before anything starts a thread: the seed of all zygotes is a copy of this process.
    if os.fork() == 0:
        from .zygote import serve

        ours.close()
        if answer_fd >= 0:
            os.close(answer_fd)
        serve(theirs, agent=agent_pid, key="plain", modules=[], env={})
    theirs.close()
    logging.basicConfig(level=logging.WARNING, format="danaus agent: %(message)s")
    slot, life = (settings.slot, settings.incarnation) if settings is not None else (0, 0)
    agent = Agent(directory, parent_fd, host, log_directory, ours, slot=slot, life=life)
    if settings is not None:
        answer = {
            "endpoint": agent.join(settings),
            "pid": agent_pid,
            "directory": directory,
            "logs": log_directory,
        }
        os.write(answer_fd, wire.pack(answer))
        os.close(answer_fd)
    sweep(os.path.dirname(directory))
    agent.run()


def _open_parent(pid: int) -> int | None:
    """Return a pidfd of the parent process, or None where that is no longer ``pid``."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        if os.getppid() == pid:
            return pidfd
        os.close(pidfd)
    return None
