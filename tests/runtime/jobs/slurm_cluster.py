"""A real Slurm on this machine, as root: slurmctld and some slurmd that each play a node with two GPUs.

Directories, ports, the munge key and its socket are this cluster's own, and all its processes end with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

INSTALL = "apt-get install slurm-wlm munge"
NODES = 4
LIMIT_S = 20.0
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue", "munged")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CONFIG = """
ClusterName=danaus
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge/socket
SlurmctldPort={ports[0]}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=20
InactiveLimit=0
KillWait=5
MinJobAge=30
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
{nodes}
PartitionName=main Nodes=n[1-{count}] Default=YES MaxTime=60 State=UP PriorityTier=1
PartitionName=urgent Nodes=n[1-{count}] MaxTime=60 State=UP PriorityTier=10
"""


@dataclass(slots=True)
class SlurmCluster:
    """The cluster, for as long as :func:`slurm_cluster` runs it."""

    directory: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def config(self) -> str:
        return str(self.directory / "slurm.conf")

    def run(self, *command: str) -> str:
        """Run one of Slurm's tools and return its output."""
        env = {**os.environ, "SLURM_CONF": self.config, "PATH": PATH}
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=LIMIT_S).stdout

    def start(self, name: str, *command: str) -> None:
        with (self.directory / f"{name}.out").open("wb") as out:
            env = {**os.environ, "SLURM_CONF": self.config, "PATH": PATH}
            process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self.processes.append(process)

    def idle_nodes(self) -> int:
        with contextlib.suppress(subprocess.CalledProcessError):
            return sum(int(line) for line in self.run("sinfo", "-h", "-t", "idle", "-p", "main", "-o", "%D").split())
        return 0

    def wait_idle(self, nodes: int = NODES) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while self.idle_nodes() < nodes:
            if time.monotonic() > deadline_s:
                raise AssertionError(f"Slurm's nodes do not come up:\n{self.logs()}")
            time.sleep(0.05)

    def cancel_all(self) -> None:
        """End whatever runs, and wait until it has ended."""
        self.run("scancel", "--user=root")
        deadline_s = time.monotonic() + LIMIT_S
        while self.run("squeue", "--noheader").strip():
            assert time.monotonic() < deadline_s, self.logs()
            time.sleep(0.05)

    def logs(self) -> str:
        files = [*self.directory.glob("*.log"), *self.directory.glob("*.out")]
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in sorted(files))


def missing() -> str | None:
    """Why there can be no cluster here, None if there can."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if lacking:
        return f"no {', '.join(lacking)}: {INSTALL}"
    return None if os.getuid() == 0 else "slurmctld and slurmd are started as root"


@contextlib.contextmanager
def slurm_cluster(directory: Path) -> Generator[SlurmCluster]:
    cluster = SlurmCluster(directory)
    _write_configuration(directory)
    try:
        munge = directory / "munge"
        paths = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        # --force: its directories lie under /tmp, which others may write to.
        options = [f"--{option}={munge / name}" for option, name in paths.items()]
        cluster.start("munged", "munged", "--foreground", "--force", "--num-threads=2", *options)
        cluster.start("slurmctld", "slurmctld", "-D", "-f", cluster.config)
        for index in range(1, NODES + 1):
            cluster.start(f"slurmd-n{index}", "slurmd", "-D", "-N", f"n{index}", "-f", cluster.config)
        cluster.wait_idle()
        yield cluster
    finally:
        _end(cluster)


def _write_configuration(directory: Path) -> None:
    for name in ("state", "spool", "munge", "sockets"):
        (directory / name).mkdir(mode=0o700)
    key = directory / "munge" / "key"
    key.touch(mode=0o400)
    key.write_bytes(os.urandom(1024))
    gpus = [directory / f"gpu{index}" for index in range(2)]
    for gpu in gpus:
        # A device that does nothing: /dev/null's.
        os.mknod(gpu, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (directory / "gres.conf").write_text(f"NodeName=n[1-{NODES}] Name=gpu File={directory}/gpu[0-1]\n")
    ports = _free_ports(NODES + 1)
    host = socket.gethostname().partition(".")[0]
    nodes = "\n".join(
        f"NodeName=n{index} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[index]} "
        "CPUs=4 RealMemory=4000 Gres=gpu:2"
        for index in range(1, NODES + 1)
    )
    text = CONFIG.format(host=host, directory=directory, ports=ports, nodes=nodes, count=NODES)
    (directory / "slurm.conf").write_text(text)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _end(cluster: SlurmCluster) -> None:
    """Cancel what runs, then end the daemons, munged last."""
    with contextlib.suppress(subprocess.SubprocessError):
        cluster.cancel_all()
    for process in reversed(cluster.processes):
        process.terminate()
        try:
            process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(LIMIT_S)
    for pid in _stuck_steps(cluster.directory):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _stuck_steps(directory: Path) -> list[int]:
    """What watches a step of a node that was taken down: it goes on trying to tell an srun that has ended."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_step = (process / "comm").read_text().startswith("slurmstepd")
            if is_step and any(os.readlink(file).startswith(str(directory)) for file in (process / "fd").iterdir()):
                found.append(int(process.name))
    return found
