"""The training program at its smallest, whole and with a rank lost on the way."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import danaus.programs
from danaus.programs.train import Config, main, parse_config

pytestmark = [pytest.mark.torch, pytest.mark.timeout(60)]
SMALLEST = Config(
    ranks=2,
    steps=6,
    model="tiny",
    max_text_mib=0.1,
    seq_len=32,
    batch_size=4,
    micro_batch_size=1,
    save_every=2,
    prompt="def ",
    sample_tokens=20,
    timeout_s=30.0,
)


def test_it_learns_saves_draws_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = main(replace(SMALLEST, out=str(tmp_path)))

    assert list(log.losses) == [1, 2, 3, 4, 5, 6]
    assert log.losses[6] < log.losses[1]
    assert list(log.held_out) == [2, 4, 6]
    assert log.sample.startswith("def ")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "loss.png", "run.json", "sample.txt", "step-00000002", "step-00000004", "step-00000006",
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert "2 ranks on cpu" in out
    assert "all replicas are equal to the last bit" in out


def test_a_lost_rank_changes_neither_losses_nor_result(tmp_path: Path) -> None:
    undisturbed = main(replace(SMALLEST, out=str(tmp_path / "a")))

    log = main(replace(SMALLEST, out=str(tmp_path / "b"), kill_rank_at=4))

    # the kill may land when step 4 has just been done
    assert list(log.recoveries) in ([4], [5])
    assert log.losses == undisturbed.losses
    assert log.state_hash == undisturbed.state_hash


def test_a_resumed_run_has_the_losses_of_both_parts(tmp_path: Path) -> None:
    main(replace(SMALLEST, ranks=1, out=str(tmp_path), steps=4))

    log = main(replace(SMALLEST, ranks=2, out=str(tmp_path), steps=6, resume=True))

    assert list(log.losses) == [1, 2, 3, 4, 5, 6]
    assert list(log.held_out) == [2, 4, 6]


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "manifest.json").write_text("{}")

    with pytest.raises(FileExistsError, match="add --resume to go on from them"):
        main(replace(SMALLEST, out=str(tmp_path)))


def test_byte_pairs_can_be_learned_on_the_way(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")

    log = main(replace(SMALLEST, ranks=1, steps=2, out=str(tmp_path), bpe_vocab=300))

    assert log.sample.startswith("def ")


@pytest.mark.parametrize("line", ["--resume", "--ranks 0", "--save-every 0"])
def test_a_command_line_that_makes_no_sense_is_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(Config, line.split())

    assert "error:" in capsys.readouterr().err


def test_it_runs_by_path_and_by_name() -> None:
    path = Path(danaus.programs.__path__[0]) / "train.py"

    for command in ([str(path)], ["-m", "danaus.programs.train"]):
        shown = subprocess.run(
            [sys.executable, *command, "--help"], capture_output=True, text=True, timeout=50, check=True
        )
        assert "--kill-rank-at" in shown.stdout
