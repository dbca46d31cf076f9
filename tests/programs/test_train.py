"""The training program at its smallest, whole and with a rank lost on the way."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

import danaus.programs
from danaus import FailureKind, SupervisionError
from danaus.programs.chaos import Loss
from danaus.programs.train import Config, main, parse_config, read_corpus, run

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


def test_a_lost_rank_changes_neither_losses_nor_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    undisturbed = main(replace(SMALLEST, out=str(tmp_path / "a")))

    log = main(replace(SMALLEST, out=str(tmp_path / "b"), kill_rank_at=4))

    assert list(log.recoveries) == [4]
    assert [(failure.rank, failure.incarnation) for failure in log.lost] == [(1, 0)]
    assert (log.losses, log.held_out) == (undisturbed.losses, undisturbed.held_out)
    assert log.state_hash == undisturbed.state_hash
    assert "step 4 is completed" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_lost_host_changes_neither_losses_nor_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = main(replace(SMALLEST, out=str(tmp_path / "a")))
    # The agents of hosts that are attached from now on read it.
    danaus.shutdown_context().get()
    monkeypatch.setenv("DANAUS_GRACE_S", "2")
    monkeypatch.setenv("DANAUS_STATE_DIR", str(tmp_path / "state"))

    # What a killed agent leaves behind is in there.
    with tempfile.TemporaryDirectory(prefix="dt-", dir="/tmp") as sockets:
        monkeypatch.setenv("DANAUS_SOCKET_DIR", sockets)
        log = main(replace(SMALLEST, out=str(tmp_path / "b"), hosts=2, kill_host_at=4))
        danaus.shutdown_context().get()

    assert list(log.recoveries) == [4]
    assert [(failure.rank, failure.kind) for failure in log.lost] == [(1, FailureKind.HOST_LOST)]
    assert (log.losses, log.held_out) == (undisturbed.losses, undisturbed.held_out)
    assert log.state_hash == undisturbed.state_hash
    assert "about to kill the host of rank 1 at 'backward' of step 4" in capsys.readouterr().out


def test_chaos_ends_in_the_state_of_an_undisturbed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = main(replace(SMALLEST, steps=8, out=str(tmp_path), chaos=6))

    out = capsys.readouterr().out
    assert len(log.lost) == 6
    assert "killed 6 ranks, at: data 1, forward 1, backward 1, all_reduce 1, optimizer 1, checkpoint 1" in out
    assert out.count(f"state {log.state_hash[:16]}") == 2


def test_a_rank_that_is_lost_too_often_ends_the_run(tmp_path: Path) -> None:
    config = replace(SMALLEST, out=str(tmp_path), max_restarts=1)
    losses = [Loss(0, "forward", 2), Loss(1, "forward", 3)]

    with pytest.raises(SupervisionError, match=r"rank 1 .* was killed by SIGKILL"):
        run(config, read_corpus(config), tmp_path, losses)


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


@pytest.mark.parametrize(
    "line",
    [
        "--resume",
        "--ranks 0",
        "--save-every 0",
        "--chaos 200",
        "--chaos 3 --resume --out x",
        "--hosts 3",
        "--kill-host-at 5",
        "--hosts 2 --kill-host-at 5 --kill-rank-at 5",
    ],
)
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
