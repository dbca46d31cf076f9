"""Command lines made from a Config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from danaus.programs.arguments import field_docs, parse_config


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A run."""

    size: int
    """How large."""
    rate: float = 0.5
    """How fast, in % per step."""
    kind: Literal["a", "b"] = "a"
    """Which."""
    names: tuple[str, ...] = ()
    limit: int | None = None
    """No more than this."""
    loud: bool = False
    """Print more."""

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"--size {self.size} is negative")


def test_every_field_is_an_option_of_its_type() -> None:
    line = "--size 3 --rate 0.1 --kind b --names x y --limit 7 --loud"

    assert parse_config(Config, line.split()) == Config(
        size=3, rate=0.1, kind="b", names=("x", "y"), limit=7, loud=True
    )


def test_fields_left_out_have_their_defaults() -> None:
    assert parse_config(Config, ["--size", "1", "--no-loud"]) == Config(size=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: --size"),
        ("--size x", "invalid int value: 'x'"),
        ("--size 1 --kind c", "invalid choice: 'c'"),
        ("--size -1", "--size -1 is negative"),
        ("--size 1 --colour red", "unrecognized arguments: --colour red"),
    ],
)
def test_a_wrong_command_line_ends_the_program_with_the_reason(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_config(Config, line.split())

    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_explains_each_option_by_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(Config, ["--help"], about="Does things.")

    shown = " ".join(capsys.readouterr().out.split())
    assert "Does things." in shown
    assert "How fast, in % per step (default: 0.5)" in shown
    assert "No more than this" in shown


def test_docstrings_of_fields_are_found_by_name() -> None:
    docs = field_docs(Config)

    assert docs["size"] == "How large"
    assert "names" not in docs
