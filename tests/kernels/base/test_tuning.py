"""Stored configurations lie over defaults, and only what was measured is stored."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from danaus.kernels import tuning
from danaus.kernels.tuning import config_for, store, using

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEFAULT = {"BLOCK": 64, "num_warps": 4}


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of configurations, on a device called "chip"."""
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    monkeypatch.setattr(tuning, "device_name", lambda: "chip")
    tuning._stored.cache_clear()
    yield tmp_path
    tuning._stored.cache_clear()


def test_without_a_file_the_default_holds_and_may_be_changed(configs: Path) -> None:
    config_for("op", "d64", DEFAULT)["BLOCK"] = 1

    assert config_for("op", "d64", DEFAULT) == DEFAULT


def test_what_was_stored_replaces_parts_of_the_default(configs: Path) -> None:
    store("chip", "op", "d64", {"num_warps": 8})

    assert config_for("op", "d64", DEFAULT) == {"BLOCK": 64, "num_warps": 8}
    assert config_for("op", "d128", DEFAULT) == DEFAULT
    assert config_for("other", "d64", DEFAULT) == DEFAULT


def test_storing_keeps_the_other_entries_and_none_removes_one(configs: Path) -> None:
    store("chip", "op", "d64", {"num_warps": 8})
    store("chip", "op", "d128", {"num_warps": 2})
    store("chip", "op", "d64", None)

    assert json.loads((configs / "chip.json").read_text()) == {"op": {"d128": {"num_warps": 2}}}


def test_an_override_beats_the_file_and_ends_with_its_block(configs: Path) -> None:
    store("chip", "op", "d64", {"num_warps": 8})

    with using("op", {"BLOCK": 16}), using("op", {}) as asked:
        assert config_for("op", "d64", DEFAULT) == DEFAULT
        assert asked == {"d64"}
    with using("op", {"BLOCK": 16}):
        assert config_for("op", "d64", DEFAULT) == {"BLOCK": 16, "num_warps": 4}
    assert config_for("op", "d64", DEFAULT) == {"BLOCK": 64, "num_warps": 8}


def test_kept_files_hold_small_numbers_by_operation_and_key() -> None:
    for path in tuning.CONFIGS.glob("*.json"):
        for keys in json.loads(path.read_text()).values():
            for config in keys.values():
                assert all(isinstance(value, int) for value in config.values()), path
