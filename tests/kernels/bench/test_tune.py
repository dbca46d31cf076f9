"""Tuning keeps what is clearly faster than the default and computes the same."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from danaus.kernels import tuning
from danaus.kernels.bench import tune as module
from danaus.kernels.bench.case import Case, Tune, call
from danaus.kernels.bench.tune import tune
from danaus.kernels.tuning import config_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DEFAULT = {"BLOCK": 64}
CASE = Case(
    name="op",
    shape="N 4",
    make=lambda device, small: (),
    variants={"triton": call(max)},
    unit="TB/s",
    work=1.0,
    tune=Tune(op="op", key="d64", candidates=[{"BLOCK": 32}, {"BLOCK": 128}, {"BLOCK": 256}]),
)


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """Tune with given times by block, and blocks whose results are wrong; return what was stored."""
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    monkeypatch.setattr(module, "device_name", lambda: "chip")
    tuning._stored.cache_clear()

    def run(times_us: dict[int, float], *, wrong: tuple[int, ...] = ()) -> dict[str, Any]:
        def block() -> int:
            return config_for("op", "d64", DEFAULT)["BLOCK"]

        monkeypatch.setattr(module, "time_us", lambda case, prepare, device: times_us[block()])
        monkeypatch.setattr(module, "check", lambda *_, **__: ["triton: wrong"] if block() in wrong else [])
        tune(CASE)
        return json.loads((tmp_path / "chip.json").read_text())

    yield run
    tuning._stored.cache_clear()


def test_the_fastest_is_stored(tuned: Callable[..., dict[str, Any]]) -> None:
    assert tuned({64: 10.0, 32: 9.0, 128: 8.0, 256: 12.0}) == {"op": {"d64": {"BLOCK": 128}}}


def test_a_key_that_no_call_asks_for_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "device_name", lambda: "chip")
    monkeypatch.setattr(module, "check", lambda *_, **__: [])
    monkeypatch.setattr(module, "time_us", lambda *_: float(bool(config_for("op", "d128", DEFAULT))))

    with pytest.raises(ValueError, match=r"op: tunes op for 'd64', its calls ask for \['d128'\]"):
        tune(CASE)


def test_noise_is_not_stored_and_removes_what_was(tuned: Callable[..., dict[str, Any]]) -> None:
    tuned({64: 10.0, 32: 9.0, 128: 9.5, 256: 9.5})

    assert tuned({64: 10.0, 32: 9.9, 128: 10.0, 256: 12.0}) == {}


def test_what_computes_something_else_is_not_stored(tuned: Callable[..., dict[str, Any]]) -> None:
    stored = tuned({64: 10.0, 32: 9.0, 128: 8.0, 256: 12.0}, wrong=(128,))

    assert stored == {"op": {"d64": {"BLOCK": 32}}}


def test_what_does_not_fit_the_gpu_is_not_stored(tuned: Callable[..., dict[str, Any]]) -> None:
    # 256 has no time: looking it up raises, as a launch does that wants too much shared memory
    assert tuned({64: 10.0, 32: 9.0, 128: 9.5}) == {"op": {"d64": {"BLOCK": 32}}}
