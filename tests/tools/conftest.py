"""A job that runs, and a folder where none does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from danaus.runtime.jobs.local_job import LocalJob

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LIMIT_S = 60.0


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalJob]:
    """A job of two hosts."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DANAUS_STATE_DIR", str(folder))
        patch.setenv("DANAUS_LOG_DIR", str(folder / "logs"))
        with LocalJob(hosts=2, name="train", detached=True) as job:
            job.apply()
            job._wait_listening(LIMIT_S, time.monotonic() + LIMIT_S)
            yield job


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No job runs; returns a folder to work in."""
    monkeypatch.setenv("DANAUS_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path
