"""What a SlurmJob runs on each node: finds the node's address and becomes the daemon that listens there.

srun ... python -m danaus.runtime.jobs.slurm_host --directory DIRECTORY --name JOB.INDEX [--interface ib0]
"""

from __future__ import annotations

import argparse
import fcntl
import ipaddress
import os
import re
import socket
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .launch import host_arguments, run_tool

if TYPE_CHECKING:
    from collections.abc import Sequence

SIOCGIFADDR: Final = 0x8915
SCONTROL_LIMIT_S: Final = 30.0
ANY_PORT: Final = 9


def main(arguments: Sequence[str]) -> None:
    """Become the daemon; signals from Slurm reach it as they would this process."""
    parser = argparse.ArgumentParser(prog="slurm_host")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--name", required=True, help="id of the Slurm job, a dot, the node's index in it")
    parser.add_argument("--interface", default="")
    options = parser.parse_args(arguments)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    (options.directory / f"node-{options.name}").write_text(node, encoding="utf-8")
    address = address_of_interface(options.interface) if options.interface else node_address(node)
    bracketed = f"[{address}]" if ":" in address else address
    command = host_arguments(
        listen=f"tcp://{bracketed}:0",
        key=str(options.directory / "key"),
        name=node,
        ready_file=str(options.directory / f"ready-{options.name}"),
    )
    os.execv(sys.executable, [sys.executable, *command])  # noqa: S606  our own interpreter


def node_address(node: str) -> str:
    """The address by which the rest of the cluster reaches this node: that which Slurm uses."""
    shown = run_tool(["scontrol", "--oneliner", "show", "node", node], timeout_s=SCONTROL_LIMIT_S)
    match = re.search(r"\bNodeAddr=(\S+)", shown.out)
    return _number(match[1] if match else node) or _address_towards(os.environ.get("SLURM_SUBMIT_HOST", ""))


def _number(name: str) -> str | None:
    """Resolve ``name``; None where it is unknown, or only a name that this node has for itself."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    addresses = [str(item[4][0]) for item in found]
    # Debian's /etc/hosts has 127.0.1.1 for a machine's own name, which nobody else can use.
    usable = [item for item in addresses if item == name or not ipaddress.ip_address(item.split("%")[0]).is_loopback]
    return usable[0] if usable else None


def _address_towards(host: str) -> str:
    """This node's address on the way to ``host``; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, ANY_PORT))
        except OSError as error:
            raise SystemExit(
                f"slurm_host: this node finds no address of its own by which others reach it ({error}): name its "
                "network interface, SlurmJob(interface='eth0')"
            ) from error
        return str(probe.getsockname()[0])


def address_of_interface(name: str) -> str:
    """Return the IPv4 address of a network interface.

    Raises:
        SystemExit: There is none; the text lists those that there are.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            reply = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError as error:
            known = ", ".join(interface for _, interface in socket.if_nameindex())
            raise SystemExit(
                f"slurm_host: interface {name!r} has no IPv4 address ({error}); there are: {known}"
            ) from error
    return socket.inet_ntoa(reply[20:24])


if __name__ == "__main__":
    main(sys.argv[1:])
