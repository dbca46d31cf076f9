"""Kernels run on the GPU where there is one, else in Triton's interpreter (tests/conftest.py chooses)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from danaus.tools.doctor import available_markers

if TYPE_CHECKING:
    import torch

HAS_TRITON = find_spec("torch") is not None and find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON else ["*.py"]


def pytest_report_header() -> str:
    """Say what was left out, since modules that cannot be imported leave no skip behind."""
    return "tests/kernels: " + ("all of it" if HAS_TRITON else "left out, for want of torch or triton")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run here: the GPU, or the CPU with the interpreter."""
    import torch

    return torch.device("cuda" if "gpu" in available_markers() else "cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)
