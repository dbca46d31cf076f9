"""What a training run keeps of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from danaus import FailureKind, MeshFailure
from danaus.programs.run_log import RunLog

if TYPE_CHECKING:
    from pathlib import Path

    from danaus.actors import StepMetrics

pytestmark = pytest.mark.torch


def metrics(step: int, loss: float) -> StepMetrics:
    from danaus.actors import StepMetrics

    return StepMetrics(step=step, loss=loss, grad_norm=1.0, lr=0.1, num_tokens=10, duration_s=0.1, memory_bytes=1)


def failure(rank: int, *, at_s: float, detail: str = "") -> MeshFailure:
    return MeshFailure(kind=FailureKind.KILLED, mesh="trainers", rank=rank, host="here", at_s=at_s, detail=detail)


def test_a_recovery_lasts_until_a_step_that_had_not_been_done(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.on_step(metrics(step, 1.0), now_s=float(step))

    log.on_rank_lost(failure(1, at_s=4.0))
    log.on_step(metrics(3, 1.0), now_s=5.0)
    assert log.recoveries == {}
    log.on_rank_lost(failure(2, at_s=5.5))
    log.on_step(metrics(4, 0.5), now_s=6.0)
    log.on_step(metrics(5, 0.4), now_s=7.0)

    assert log.recoveries == {4: 2.0}
    assert log.losses == {1: 1.0, 2: 1.0, 3: 1.0, 4: 0.5, 5: 0.4}


def test_a_loss_that_several_calls_tell_of_is_noted_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path)

    news = [
        log.on_rank_lost(failure(rank, at_s=1.0, detail=detail)) for rank, detail in [(1, ""), (1, "more"), (2, "")]
    ]

    assert news == [True, False, True]
    assert [each.rank for each in log.lost] == [1, 2]


def test_a_later_run_knows_the_steps_up_to_its_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.on_step(metrics(step, 1.0 / step), now_s=0.0)
    log.held_out[2] = 0.7
    log.write()

    assert RunLog.read(tmp_path, up_to=2) == RunLog(tmp_path, {1: 1.0, 2: 0.5}, {2: 0.7})
    assert RunLog.read(tmp_path / "other", up_to=2).losses == {}


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = RunLog(tmp_path, {1: 3.0, 2: 2.0}, {2: 2.5}, {2: 0.4})

    assert log.plot().read_bytes().startswith(b"\x89PNG")


def test_the_summary_tells_losses_recoveries_and_equality(tmp_path: Path) -> None:
    text = RunLog(tmp_path, {1: 3.0, 9: 2.0}, {}, {5: 0.44}, state_hash="abcdef").summary()

    assert "loss 3.000 at step 1, 2.000 at step 9" in text
    assert "lost before step 5 was done: 0.44 s" in text
    assert "equal to the last bit, state abcdef" in text


def test_many_recoveries_are_told_as_one(tmp_path: Path) -> None:
    text = RunLog(tmp_path, {1: 3.0}, {}, {2: 0.4, 4: 0.1, 5: 0.3, 8: 0.2}).summary()

    assert "lost before 4 steps were done: median 0.25 s until they were, longest 0.40 s" in text
