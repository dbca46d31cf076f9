"""Jobs keep their state in a folder of the test's own; real sshd and Slurm run once for all tests that ask for them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from . import slurm_cluster, ssh_server

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the jobs of this test are remembered."""
    path = tmp_path / "state"
    monkeypatch.setenv("DANAUS_STATE_DIR", str(path))
    return path


@pytest.fixture(scope="session")
def sshd() -> Iterator[ssh_server.SSHServer]:
    """A real sshd on loopback, as this user."""
    reason = ssh_server.missing_programs()
    if reason is not None:
        pytest.skip(reason)
    with _directory() as directory, ssh_server.ssh_server(directory) as server:
        yield server


@pytest.fixture(scope="session")
def slurm_session() -> Iterator[slurm_cluster.SlurmCluster]:
    """A real Slurm of four nodes on this machine."""
    reason = slurm_cluster.missing()
    if reason is not None:
        pytest.skip(reason)
    with _directory() as directory, slurm_cluster.slurm_cluster(directory) as cluster:
        yield cluster


@pytest.fixture
def slurm(
    slurm_session: slurm_cluster.SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> Iterator[slurm_cluster.SlurmCluster]:
    """The cluster, all of it idle, in whose configuration Slurm's tools look."""
    monkeypatch.setenv("SLURM_CONF", slurm_session.config)
    monkeypatch.setenv("PATH", slurm_cluster.PATH)
    # A cancelled step leaves nobody to say that a host is gone.
    monkeypatch.setenv("DANAUS_GRACE_S", "4")
    slurm_session.wait_idle()
    yield slurm_session
    slurm_session.cancel_all()


@contextlib.contextmanager
def _directory() -> Generator[Path]:
    """A short path: sockets lie in it, and pytest's own are long."""
    path = Path(tempfile.mkdtemp(prefix="dj-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
