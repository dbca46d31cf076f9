"""The benchmark's cases agree with their references; its table keeps what it did not measure again."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest
import torch

from danaus.kernels.bench import command
from danaus.kernels.bench.case import Case, backward, call
from danaus.kernels.bench.find import all_cases, choose
from danaus.kernels.bench.measure import check, measure
from danaus.kernels.bench.rows import Row
from danaus.kernels.bench.table import BEGIN, END, merge

if TYPE_CHECKING:
    from pathlib import Path

CASES = all_cases()
HAS_GPU = torch.cuda.is_available()


def case(name: str = "double", shape: str = "N 4", **changes: object) -> Case:
    """A case whose operation doubles, on any device."""
    made = Case(
        name=name,
        shape=shape,
        make=lambda device, small: (torch.ones(4, device=device, requires_grad=True),),
        variants={"reference": call(lambda x: x * 2), "triton": call(lambda x: x + x)},
        unit="TB/s",
        work=32e6,
        good=3.0,
        top=4.0,
    )
    return dataclasses.replace(made, **changes)  # pyright: ignore[reportArgumentType]


def row(of: Case, **changes: object) -> Row:
    """A row that was measured: 10 us for the kernel, 20 for torch."""
    made = Row.of(of, {"triton": 10.0, "torch": 20.0}, {})
    return dataclasses.replace(made, **changes)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.name}-{case.shape}" for case in CASES])
def test_every_way_of_a_case_agrees_with_its_reference(case: Case, device: torch.device) -> None:
    assert check(case, device) == []


def test_a_wrong_or_failing_way_is_named() -> None:
    wrong = case(
        variants={
            "reference": call(lambda x: x * 2),
            "triton": call(lambda x: x * 3),
            "short": call(lambda x: x[:1]),
            "failing": call(lambda x: x.nothing),
        }
    )

    assert check(wrong, torch.device("cpu")) == [
        "triton: result 0 is off by 0.5 of its norm, allowed 0.02",
        "short: result 0 has shape (1,), expected (4,)",
        "failing: AttributeError: 'Tensor' object has no attribute 'nothing'",
    ]


def test_whole_numbers_have_to_be_equal() -> None:
    off = case(
        make=lambda device, small: (torch.arange(4, device=device),),
        variants={"reference": call(lambda x: x), "triton": call(lambda x: x + (x == 3))},
    )

    assert check(off, torch.device("cpu")) == ["triton: result 0 differs, and whole numbers have to be equal"]


def test_backward_compares_gradients() -> None:
    good = case(variants={"reference": backward(lambda x: x**2), "triton": backward(lambda x: (x * x, None))})

    assert check(good, torch.device("cpu")) == []


def test_a_wrong_kernel_gets_no_number() -> None:
    wrong = case(variants={"reference": call(lambda x: x * 2), "triton": call(lambda x: x)})

    got = measure(wrong, torch.device("cpu"))

    assert got.times_us == {}
    assert got.problem.startswith("triton: result 0 is off")


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU, which would be measured")
def test_without_a_gpu_every_row_reads_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, record = tmp_path / "README.md", tmp_path / "record.json"
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n")

    assert command.main(["--readme", str(readme), "--json", str(record)]) == 0

    lines = readme.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert len(lines) == len(CASES) + 6
    assert all("| not measured |" in line for line in lines[4:-2])
    assert [item["name"] for item in json.loads(record.read_text())["rows"]] == [case.name for case in CASES]
    assert f"No GPU here: {len(CASES)} cases" in capsys.readouterr().out


def test_each_row_is_written_once_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    one, two = case("one"), case("two")

    def measured(of: Case, device: torch.device) -> Row:
        if of is two:
            assert "| one | N 4 | 3.2 TB/s, 10.0 us (good) |" in readme.read_text()
            raise RuntimeError("out of | memory")
        return row(of)

    monkeypatch.setattr(command, "all_cases", lambda: [one, two])
    monkeypatch.setattr(command, "measure", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "chip")

    assert command.main(["--readme", str(readme)]) == 1
    assert "| two | N 4 | FAILED: RuntimeError: out of / memory |" in readme.read_text()


def test_check_reports_each_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = case("wrong", variants={"reference": call(lambda x: x * 2), "triton": call(lambda x: x)})
    monkeypatch.setattr(command, "all_cases", lambda: [case(), wrong])

    assert command.main(["--check"]) == 1

    out = capsys.readouterr().out.splitlines()
    assert out[0] == "double (N 4): ok"
    assert out[1].startswith("wrong (N 4): triton: result 0 is off")


def test_only_takes_beginnings_of_names_and_refuses_unknown_ones(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [case("rmsnorm"), case("rmsnorm-backward"), case("rope")]

    assert [item.name for item in choose(cases, "rms")] == ["rmsnorm", "rmsnorm-backward"]
    assert [item.name for item in choose(cases, "rope, rmsnorm-b")] == ["rmsnorm-backward", "rope"]
    with pytest.raises(ValueError, match="--only gelu: no case has that name; there are rmsnorm, "):
        choose(cases, "gelu")
    assert command.main(["--only", "no-such-case"]) == 2
    assert "no case has that name" in capsys.readouterr().err


def test_merging_keeps_measured_rows_and_drops_those_of_cases_that_are_gone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    one, two, gone = case("one"), case("two"), case("gone")

    merge(readme, [row(one), row(gone)], [one, gone])
    merge(readme, [Row.not_measured(one), row(two, times_us={"triton": 8.0})], [one, two])

    lines = readme.read_text().splitlines()[3:-1]
    assert [line.split(" | ")[2] for line in lines] == ["3.2 TB/s, 10.0 us (good)", "4 TB/s, 8.0 us (top)"]
    assert lines[0].split(" | ")[3:5] == ["torch 1.6 TB/s, 20.0 us", "3 / 4 TB/s"]


def test_a_ratio_is_of_the_time_of_the_baseline() -> None:
    assert row(case(unit="x")).value("triton") == 2.0
    assert row(case(unit="x", baseline="cublas")).value("triton") is None


def test_a_file_without_the_marks_is_refused(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no table")

    with pytest.raises(ValueError, match="each once"):
        merge(readme, [], [])
