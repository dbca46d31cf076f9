"""What holds for every test: nothing is left behind, and nothing is skipped that this machine could run.

Whatever appears during a test must be gone when the test ends. What a fixture of a module or of the whole session made
may stay until that module or session ends, since it was there before the test began; so may the runtime itself (host
agent, zygotes, the controller's threads), which is ended with the module in which it started.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

import danaus
from danaus.tools.doctor import available_markers
from danaus.tools.leftovers import kill, mark_environment, take_snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from danaus.tools.leftovers import Leftover, Snapshot

CAPABILITIES = ("gpu", "multi_gpu", "root", "torch")
GRACE_S = 3.0
"""How long what was told to end may take; the runtime promises 2 s."""

_private_dir = tempfile.mkdtemp(prefix="dt-", dir="/tmp")
_skipped: list[tuple[str, frozenset[str], str]] = []


def pytest_configure(config: pytest.Config) -> None:
    """Keep this run's files apart from those of other jobs of the same user, and know its processes."""
    mark_environment()
    # Read once per process, when triton is imported, which tests of several folders do.
    if "gpu" not in available_markers():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ["DANAUS_SOCKET_DIR"] = _private_dir
    os.environ["DANAUS_LOG_DIR"] = os.path.join(_private_dir, "logs")
    os.environ["DANAUS_STATE_DIR"] = os.path.join(_private_dir, "state")
    # Else a rank lost at the end of a test would end pytest.
    danaus.unhandled_fault_hook = lambda failure: None


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_private_dir, ignore_errors=True)


@pytest.fixture(autouse=True)
def unhandled(monkeypatch: pytest.MonkeyPatch) -> list[danaus.MeshFailure]:
    """Losses that nobody handled in this test; they would end a script."""
    seen: list[danaus.MeshFailure] = []
    monkeypatch.setattr(danaus, "unhandled_fault_hook", seen.append)
    return seen


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_by_session() -> Iterator[None]:
    yield from _check_leftovers("the session", ends_runtime=True)


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_by_module(_nothing_left_by_session: None) -> Iterator[None]:
    yield from _check_leftovers("this module", ends_runtime=True)


@pytest.fixture(autouse=True)
def _nothing_left_by_test(_nothing_left_by_module: None) -> Iterator[None]:
    yield from _check_leftovers("this test", ends_runtime=False)


def _check_leftovers(scope: str, *, ends_runtime: bool) -> Iterator[None]:
    before = take_snapshot([_private_dir])
    yield
    if ends_runtime and not before.has_runtime:
        danaus.shutdown_context()
    left = _wait_gone(before, may_keep_runtime=before.has_runtime or not ends_runtime)
    if left:
        kill(left)
        lines = "\n  ".join(map(str, left))
        advice = "stop the mesh, join the thread, close the socket"
        pytest.fail(f"{scope} left behind:\n  {lines}\n({advice})", pytrace=False)


def _wait_gone(before: Snapshot, *, may_keep_runtime: bool) -> list[Leftover]:
    deadline_s = time.monotonic() + GRACE_S
    while True:
        now = take_snapshot([_private_dir])
        left = now.added_since(before, allow_runtime=may_keep_runtime and now.has_runtime)
        if not left or time.monotonic() > deadline_s:
            return left
        time.sleep(0.01)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, by marker."""
    missing = [name for name in CAPABILITIES if item.get_closest_marker(name) and name not in available_markers()]
    if missing:
        pytest.skip(f"this machine lacks {', '.join(missing)} (danaus doctor says more)")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember what was skipped."""
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped.append((report.nodeid, frozenset(report.keywords) & frozenset(CAPABILITIES), reason))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Remember modules that skipped themselves."""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped.append((report.nodeid, frozenset(), reason))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that skipped what the machine has."""
    if session.exitstatus == pytest.ExitCode.OK and _unexplained():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the skips by marker."""
    if not _skipped:
        return
    terminalreporter.section("skipped, by marker")
    counts = Counter((", ".join(sorted(markers)) or "no marker", reason) for _, markers, reason in _skipped)
    for (markers, reason), count in sorted(counts.items()):
        terminalreporter.line(f"{markers}: {count} ({reason})")
    for nodeid, markers in _unexplained():
        names = ", ".join(sorted(markers))
        terminalreporter.line(f"FAILED: {nodeid} was skipped, though `danaus doctor` finds: {names}", red=True)


def _unexplained() -> list[tuple[str, frozenset[str]]]:
    """Skipped tests whose every needed capability this machine has."""
    return [(nodeid, markers) for nodeid, markers, _ in _skipped if markers and markers <= available_markers()]
