"""Memory in use, read now and then."""

from __future__ import annotations

import pytest
import torch

from danaus.actors import memory
from danaus.actors.memory import MemoryMeter, proportional_bytes

pytestmark = pytest.mark.torch


def test_memory_that_is_touched_shows() -> None:
    before = proportional_bytes()
    touched = bytearray(b"x") * (32 << 20)

    assert proportional_bytes() - before > 0.9 * len(touched)


def test_a_reading_is_good_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([100, 200, 300])
    monkeypatch.setattr(memory, "proportional_bytes", lambda: next(readings))
    meter = MemoryMeter(torch.device("cpu"), every_s=1.0)

    assert [meter.read_bytes(now_s=now_s) for now_s in (5.0, 5.9, 6.0, 6.5, 7.1)] == [100, 100, 200, 200, 300]
