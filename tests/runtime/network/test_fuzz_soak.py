"""The fuzzing of this folder, and of the envelope, with many more examples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = ["test_fuzz_packets.py", "test_fuzz_members.py", "test_fuzz_handshake.py", "test_daemon_protocol.py"]
LIMIT_S = 1500


@pytest.mark.soak
@pytest.mark.timeout(LIMIT_S + 30)
@pytest.mark.parametrize("name", FILES)
def test_many_more_examples(name: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--timeout={LIMIT_S}", str(HERE / name)],
        cwd=HERE.parents[2],
        env={**os.environ, "DANAUS_FUZZ_EXAMPLES": os.environ.get("DANAUS_FUZZ_EXAMPLES", "2000")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S + 20,
        check=False,
    )

    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]
