"""What the environment says of direct streams."""

from __future__ import annotations

import pytest

from danaus.runtime import config


@pytest.mark.parametrize(
    ("text", "ports"), [("", range(1)), ("40000-40999", range(40000, 41000)), ("7-7", range(7, 8))]
)
def test_ports_are_a_range(monkeypatch: pytest.MonkeyPatch, text: str, ports: range) -> None:
    monkeypatch.setenv("DANAUS_BULK_PORTS", text)

    assert config.bulk_ports() == ports


@pytest.mark.parametrize("text", ["40000", "9-8", "0-5", "1-70000", "a-b", "-5", "1-2-3"])
def test_anything_else_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DANAUS_BULK_PORTS", text)

    with pytest.raises(ValueError, match="expected two ports, as in 40000-40999"):
        config.bulk_ports()


@pytest.mark.parametrize(("text", "is_on"), [("", False), ("0", False), ("1", True), ("True", True)])
def test_switches_are_off_unless_they_are_on(monkeypatch: pytest.MonkeyPatch, text: str, is_on: bool) -> None:
    monkeypatch.setenv("DANAUS_PLAIN_BULK", text)
    monkeypatch.setenv("DANAUS_NIXL", text)

    assert config.plain_bulk() == is_on
    assert config.use_nixl() == is_on
