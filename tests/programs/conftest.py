"""Without torch there are no programs to test."""

from __future__ import annotations

from importlib.util import find_spec

HAS_TORCH = find_spec("torch") is not None
collect_ignore_glob = [] if HAS_TORCH else ["test_train.py", "test_run_log.py"]


def pytest_report_header() -> str:
    """Say what was left out, since modules that cannot be imported leave no skip behind."""
    return "tests/programs: " + ("all of it" if HAS_TORCH else "left out, for want of torch")
