"""`danaus host`: lets controllers that hold the key run jobs on this machine, until it is told to end."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import tempfile
from typing import TYPE_CHECKING, Final

import zmq

from ..runtime.network.daemon import Daemon
from ..runtime.network.keys import parse_key, read_key_file
from ..runtime.workspace.versions import own_versions

if TYPE_CHECKING:
    from collections.abc import Sequence

SUMMARY = "let controllers run jobs on this machine"
_MAX_KEY_BYTES: Final = 4096


def main(arguments: Sequence[str]) -> int:
    """Serve as a host until a signal or a controller ends it; return 1 if it could not start, after saying why.

    Returns:
        143 where SIGTERM has ended it, else 0.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="danaus host: %(message)s")
    with contextlib.ExitStack() as stack:
        try:
            daemon = stack.enter_context(_make_daemon(options))
            daemon.take_over_process()
            if options.follow is not None and not daemon.follow(options.follow):
                return 0
            if options.ready_file is not None:
                write_ready_file(options.ready_file, daemon.endpoint)
        except (OSError, ValueError, zmq.ZMQError) as error:
            print(f"danaus host: {error}", file=sys.stderr)
            return 1
        # Who started it may read no more.
        with contextlib.suppress(OSError):
            print(f"danaus host: {options.name} listens on {daemon.endpoint}", flush=True)
        daemon.run()
        # As any program that SIGTERM has ended: to a scheduler 0 means that nothing is left to do.
        return 128 + signal.SIGTERM if daemon.ended_by == signal.SIGTERM else 0


def _make_daemon(options: argparse.Namespace) -> Daemon:
    secret = _read_key(options.key)
    return Daemon(options.listen, secret, name=options.name, versions=own_versions(), advertise=options.advertise)


def write_ready_file(path: str, endpoint: str) -> None:
    """Have a file appear, whole, that only this user can read, and that says where the host listens."""
    fd, temporary = tempfile.mkstemp(prefix=".danaus-host-", dir=os.path.dirname(os.path.abspath(path)))
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(f"{endpoint}\n")
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _read_key(path: str | None) -> bytes:
    if path is None:
        raise ValueError(
            "no key: whoever can connect could run code here, so a host needs one even on loopback; make it with "
            "`danaus key FILE` and pass --key FILE"
        )
    return parse_key(sys.stdin.buffer.read(_MAX_KEY_BYTES), "standard input") if path == "-" else read_key_file(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="danaus host",
        description=SUMMARY,
        epilog="SIGTERM lets running jobs drain and ends; a second one, SIGINT or HostMesh.shutdown() ends at once.",
    )
    parser.add_argument(
        "--listen",
        metavar="tcp://HOST:PORT",
        default="tcp://127.0.0.1:0",
        help="where to listen (default %(default)s); port 0 takes a free one, host * every interface",
    )
    parser.add_argument("--key", metavar="FILE", help="key file (see `danaus key`); - reads its content from stdin")
    parser.add_argument("--name", default=os.uname().nodename, help="name of this host (default %(default)s)")
    parser.add_argument("--ready-file", metavar="FILE", help="written once it listens: its address")
    parser.add_argument("--follow", metavar="PID", type=int, help="end at once when that process ends")
    parser.add_argument("--advertise", metavar="HOST", help="host by which others reach it, if not that of --listen")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
