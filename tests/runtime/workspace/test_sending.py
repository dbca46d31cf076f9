"""How a sync speaks with hosts that only count: what is under way at once, and what is not sent at all."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from danaus.runtime.workspace import sending as module
from danaus.runtime.workspace.errors import WorkspaceError
from danaus.runtime.workspace.host_copy import Outcome
from danaus.runtime.workspace.manifest import unpack_manifest
from danaus.runtime.workspace.scan import scan
from danaus.runtime.workspace.sending import Sending, SyncReport

from .trees import write

if TYPE_CHECKING:
    from pathlib import Path


class FakeHosts:
    """Two hosts that lack everything; their answers count as under way until somebody asks for them."""

    def __init__(self, *, root: bytes = b"", outcome: Outcome | None = None) -> None:
        self.asked: list[str] = []
        self.under_way = self.most_under_way = 0
        self.root = SimpleNamespace(call=lambda: self._answer("root", root))
        self.offer = SimpleNamespace(call=lambda part, **_: self._answer("offer", _digests(part)))
        self.put = SimpleNamespace(call=lambda _pack, **_: self._answer("put", None))
        self.commit = SimpleNamespace(call=lambda: self._answer("commit", outcome or Outcome(written=1)))

    def flatten(self, _label: str) -> FakeHosts:
        return self

    def slice(self, *, host: slice) -> FakeHosts:
        assert host == slice(0, 2)
        return self

    def __len__(self) -> int:
        return 2

    def _answer(self, name: str, value: Any) -> Any:
        self.asked.append(name)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)

        def get(timeout: float) -> list[Any]:
            assert timeout > 0
            self.under_way -= 1
            return [value, value]

        return SimpleNamespace(get=get)


def _digests(part: bytes) -> bytes:
    return b"".join(unpack_manifest(part).sizes())


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with files that make many messages."""
    monkeypatch.setattr(module, "PART_BYTES", 1000)
    return write(tmp_path / "work", {f"{index}.bin": bytes([index]) * 900 for index in range(30)})


def send(hosts: FakeHosts, work: Path) -> SyncReport:
    return Sending(hosts, str(work), scan(str(work)).manifest, time.monotonic() + 10, lambda _: None).run()


def test_few_messages_are_under_way_at_once(work: Path) -> None:
    hosts = FakeHosts()

    report = send(hosts, work)

    assert report == SyncReport(hosts=2, files_sent=30, bytes_sent=27_000, files_written=1)
    assert hosts.asked == ["root", "offer", *["put"] * 30, "commit"]
    assert hosts.most_under_way == module.WINDOW + 1
    assert hosts.under_way == 0


def test_hosts_that_hold_it_all_are_asked_for_one_hash(work: Path) -> None:
    root = scan(str(work)).manifest.root
    hosts = FakeHosts(root=root)

    assert send(hosts, work) == SyncReport(hosts=2)
    assert hosts.asked == ["root"]


def test_where_another_controller_takes_away_what_was_there_it_is_tried_a_few_times(work: Path) -> None:
    hosts = FakeHosts(outcome=Outcome(missing=(bytes(16),)))

    with pytest.raises(WorkspaceError, match="another controller keeps sending something else"):
        send(hosts, work)

    assert hosts.asked.count("commit") == module.ATTEMPTS
