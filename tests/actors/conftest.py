"""Groups of ranks in the threads of one process: collectives are real, nothing has to be started."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, TypeVar

import pytest

R = TypeVar("R")
RunRanks = Callable[[int, Callable[[int, Any], R]], list[R]]

HAS_TORCH = find_spec("torch") is not None
collect_ignore_glob = [] if HAS_TORCH else ["*.py"]


def pytest_report_header() -> str:
    """Say what was left out, since modules that cannot be imported leave no skip behind."""
    return "tests/actors: " + ("all of it" if HAS_TORCH else "left out, for want of torch")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models as small as these gain nothing from more threads, which wait for each other on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_ranks() -> RunRanks[Any]:
    """Call ``function(rank, group)`` for each of n ranks at once; return what they return, in rank order."""
    import torch.distributed as dist

    def run(num_ranks: int, function: Callable[[int, Any], R]) -> list[R]:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        results: dict[int, R] = {}
        errors: list[BaseException] = []

        def rank(number: int) -> None:
            try:
                group = dist.ProcessGroupGloo(store, number, num_ranks, timedelta(seconds=15))
                results[number] = function(number, group)
            except BaseException as error:  # noqa: BLE001  raised again by the test's thread
                errors.append(error)

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [results[number] for number in range(num_ranks)]

    return run
