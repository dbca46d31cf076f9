"""Checkpoints on disk: complete or not there, and no more of them than asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from danaus.actors import checkpoints
from danaus.actors.checkpoints import (
    Manifest,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    read_manifest,
    save_checkpoint,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.torch


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((3, 2), value), "optimizer.a.step": torch.tensor(value)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_read_into_the_tensors_that_are_there(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "new" / "folder", state(4.0), Manifest(7, {"seed": 1}))
    tensors = state(0.0)
    kept = tensors["model.a"]

    manifest = load_checkpoint(path, tensors)

    assert manifest == Manifest(7, {"seed": 1}) == read_manifest(path)
    assert torch.equal(kept, state(4.0)["model.a"])
    assert float(tensors["optimizer.a.step"]) == 4.0


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        save_checkpoint(tmp_path, state(step), Manifest(step, {}), keep=2)

    assert names(tmp_path) == ["step-00000009", "step-00000010"]
    assert [path.name for path in list_checkpoints(tmp_path)] == names(tmp_path)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000010"


def test_what_a_dead_writer_left_is_not_found_and_is_removed_by_the_next(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1.0), Manifest(1, {}))
    (tmp_path / "step-00000002.part-0a1b2c3d").mkdir()
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "notes.txt").write_text("of the user")

    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000001"
    save_checkpoint(tmp_path, state(4.0), Manifest(4, {}))
    assert names(tmp_path) == ["notes.txt", "step-00000001", "step-00000003", "step-00000004"]


def test_a_failed_write_leaves_earlier_checkpoints_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, state(1.0), Manifest(1, {}))

    def full(_directory: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints, "_flush", full)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tmp_path, state(2.0), Manifest(2, {}))

    assert names(tmp_path) == ["step-00000001"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1.0), Manifest(5, {}))
    path = save_checkpoint(tmp_path, state(2.0), Manifest(5, {}))

    tensors = state(0.0)
    load_checkpoint(path, tensors)

    assert names(tmp_path) == ["step-00000005"]
    assert float(tensors["optimizer.a.step"]) == 2.0


def test_there_is_no_newest_where_there_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None


def test_a_path_that_is_no_checkpoint_is_told_with_those_beside_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1.0), Manifest(1, {}))

    with pytest.raises(FileNotFoundError, match=r"step-00000002 is no complete checkpoint.*step-00000001"):
        load_checkpoint(tmp_path / "step-00000002", state(0.0))


@pytest.mark.parametrize("tensors", [{"model.a": torch.zeros(4, 4)}, {"model.b": torch.zeros(3, 2)}])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = save_checkpoint(tmp_path, state(1.0), Manifest(1, {}))

    with pytest.raises(ValueError, match="does not fit this state"):
        load_checkpoint(path, tensors)


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0"):
        save_checkpoint(tmp_path, state(1.0), Manifest(1, {}), keep=0)
