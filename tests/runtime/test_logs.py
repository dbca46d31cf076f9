"""Lines from many ranks: splitting, tails, joining, and the files on the host."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danaus.runtime.host.log_files import LogFiles
from danaus.runtime.host.logs import Aggregator, LineSplitter, LogOutput, Stream, Tail, format_ranks

if TYPE_CHECKING:
    from pathlib import Path


def shown(outputs: list[LogOutput]) -> list[str]:
    return [str(output) for output in outputs]


def test_lines_come_out_when_they_end() -> None:
    splitter = LineSplitter()

    assert splitter.feed(b"one\ntw") == ["one"]
    assert splitter.pending == "tw"
    assert splitter.feed(b"o") == []
    assert splitter.feed(b"\n\nthree") == ["two", ""]
    assert splitter.close() == ["three"]
    assert splitter.close() == []


def test_windows_line_ends_are_ends_and_lone_carriage_returns_stay_inside() -> None:
    assert LineSplitter().feed(b"a\r\nb\rc\nd\r\n") == ["a", "b\rc", "d"]


def test_characters_cut_by_a_chunk_arrive_whole_and_invalid_bytes_are_replaced() -> None:
    splitter = LineSplitter()

    assert splitter.feed("ä€".encode()[:3]) == []
    assert splitter.feed("ä€".encode()[3:] + b"\nx\xff\xc3\ny\n") == ["ä€", "x\ufffd\ufffd", "y"]
    splitter.feed(b"\xe2\x82")
    assert splitter.close() == ["\ufffd"]


def test_a_line_without_end_comes_in_pieces_that_cut_no_character() -> None:
    splitter = LineSplitter(max_line_bytes=5)

    assert splitter.feed(b"abcdefgh") == ["abcde"]
    assert splitter.feed("€€\n".encode()) == ["fgh", "€", "€"]
    assert LineSplitter(max_line_bytes=5).feed("€€\nshort\n".encode()) == ["€", "€", "short"]
    assert LineSplitter(max_line_bytes=4).feed(b"\x80" * 9) == ["\ufffd" * 4, "\ufffd" * 4]


def test_a_limit_below_one_character_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        LineSplitter(max_line_bytes=3)


@given(
    text=st.text(alphabet="ab€ä\U0001f98b\n", max_size=60),
    cuts=st.lists(st.integers(0, 200), max_size=10),
    limit=st.integers(4, 20),
)
def test_chunks_do_not_matter_and_nothing_is_lost(text: str, cuts: list[int], limit: int) -> None:
    data = text.encode()
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    splitter, long_splitter = LineSplitter(max_line_bytes=limit), LineSplitter()
    lines, long_lines, start = list[str](), list[str](), 0
    for end in ends:
        lines += splitter.feed(data[start:end])
        long_lines += long_splitter.feed(data[start:end])
        start = end
    lines += splitter.close()
    long_lines += long_splitter.close()

    assert "".join(lines) == text.replace("\n", "")
    assert all(len(line.encode()) <= limit for line in lines)
    assert long_lines == text.removesuffix("\n").split("\n") if text else long_lines == []


def test_the_tail_keeps_the_last_lines_short() -> None:
    tail = Tail(max_lines=2, max_chars=5)

    tail.add(["one", "two", "50%\r100%"])
    assert tail.lines() == ["two", "100%"]
    tail.add(["long line"])
    assert tail.lines() == ["100%", "long ... (4 more characters)"]


def test_equal_lines_of_many_ranks_become_one_after_the_window() -> None:
    logs = Aggregator(window_s=0.5)
    for rank in (6, 0, 1, 3, 2):
        logs.add("trainers", rank, "stdout", ["loading"], now_s=10.0 + rank / 100)

    assert logs.next_due_s == 10.56
    assert logs.due(now_s=10.55) == []
    assert shown(logs.due(now_s=10.56)) == ["[trainers 0-3,6] loading (x5)"]
    assert logs.next_due_s is None


def test_a_line_that_every_rank_wrote_waits_no_longer() -> None:
    logs = Aggregator(window_s=60.0)
    logs.set_size("w", 2)

    logs.add("w", 1, "stdout", ["up"], now_s=0.0)
    assert logs.due(now_s=0.0) == []
    logs.add("w", 0, "stdout", ["up"], now_s=0.1)

    assert shown(logs.due(now_s=0.1)) == ["[w 0-1] up (x2)"]


def test_a_rank_that_writes_after_the_window_gets_a_line_of_its_own() -> None:
    logs = Aggregator(window_s=0.5)
    logs.add("w", 0, "stdout", ["up"], now_s=0.0)
    assert shown(logs.due(now_s=0.5)) == ["[w 0] up"]

    logs.add("w", 1, "stdout", ["up"], now_s=0.6)

    assert shown(logs.flush()) == ["[w 1] up"]


def test_ranks_that_write_the_same_in_different_orders_are_not_joined_out_of_order() -> None:
    logs = Aggregator()
    logs.add("w", 0, "stdout", ["a", "b"], now_s=0.0)
    logs.add("w", 1, "stdout", ["b", "a"], now_s=0.0)

    assert shown(logs.flush()) == ["[w 0] a", "[w 0-1] b (x2)", "[w 1] a"]


def test_repetitions_of_one_rank_stay() -> None:
    logs = Aggregator()
    logs.add("w", 0, "stdout", ["0 0", "0 0"], now_s=0.0)
    logs.add("w", 1, "stdout", ["0 0", "0 0"], now_s=0.0)

    assert shown(logs.flush()) == ["[w 0-1] 0 0 (x2)", "[w 0-1] 0 0 (x2)"]


def test_meshes_and_streams_are_kept_apart() -> None:
    logs = Aggregator()
    logs.add("a", 0, "stdout", ["x"], now_s=0.0)
    logs.add("a", 1, "stderr", ["x"], now_s=0.0)
    logs.add("b", 0, "stdout", ["x"], now_s=0.0)

    assert logs.flush() == [
        LogOutput("a", (0,), "stdout", "x"),
        LogOutput("a", (1,), "stderr", "x"),
        LogOutput("b", (0,), "stdout", "x"),
    ]


def test_without_a_window_every_line_stands_alone_and_at_once() -> None:
    logs = Aggregator(window_s=None)
    logs.add("w", 0, "stdout", ["x"], now_s=0.0)
    logs.add("w", 1, "stdout", ["x"], now_s=0.0)

    assert logs.next_due_s == 0.0
    assert shown(logs.due(now_s=0.0)) == ["[w 0] x", "[w 1] x"]


def test_the_window_can_change_while_lines_wait() -> None:
    logs = Aggregator(window_s=60.0)
    logs.add("w", 0, "stdout", ["x"], now_s=0.0)

    logs.set_window(None)

    assert shown(logs.due(now_s=0.0)) == ["[w 0] x"]
    with pytest.raises(ValueError, match="or None"):
        logs.set_window(-1.0)


def test_a_flood_does_not_wait() -> None:
    logs = Aggregator(window_s=60.0, max_pending=3)
    logs.add("w", 0, "stdout", [str(n) for n in range(5)], now_s=0.0)

    assert shown(logs.due(now_s=0.0)) == ["[w 0] 0", "[w 0] 1"]


def test_a_progress_bar_shows_its_last_state() -> None:
    logs = Aggregator()
    logs.add("w", 0, "stderr", ["\r  0%\r 50%\r100%", "50%\r"], now_s=0.0)

    assert shown(logs.flush()) == ["[w 0] 100%", "[w 0] 50%"]


def test_a_forgotten_mesh_still_prints_what_waits_and_leaves_nothing() -> None:
    logs = Aggregator()
    logs.set_size("w", 1)
    logs.add("w", 0, "stdout", ["bye"], now_s=0.0)
    logs.forget("w")

    assert shown(logs.flush()) == ["[w 0] bye"]
    logs.add("w", 0, "stdout", ["again"], now_s=0.0)
    assert logs.due(now_s=0.0) == []


WRITES = st.tuples(
    st.integers(0, 3), st.sampled_from(["stdout", "stderr"]), st.lists(st.sampled_from("abc"), max_size=4)
)


@given(
    writes=st.lists(WRITES, max_size=40),
    window_s=st.one_of(st.none(), st.integers(0, 5)),
    max_pending=st.integers(0, 10),
)
def test_no_line_is_lost_and_every_rank_keeps_its_order(
    writes: list[tuple[int, Stream, list[str]]], window_s: float | None, max_pending: int
) -> None:
    logs = Aggregator(window_s=window_s, max_pending=max_pending)
    logs.set_size("w", 3)
    written: defaultdict[int, list[tuple[str, str]]] = defaultdict(list)
    outputs: list[LogOutput] = []
    for time_s, (rank, stream, lines) in enumerate(writes):
        logs.add("w", rank, stream, lines, now_s=float(time_s))
        written[rank] += [(stream, line) for line in lines]
        outputs += logs.due(now_s=float(time_s))
    outputs += logs.flush()

    read: defaultdict[int, list[tuple[str, str]]] = defaultdict(list)
    for output in outputs:
        for rank in output.ranks:
            read[rank].append((output.stream, output.line))
    assert read == {rank: lines for rank, lines in written.items() if lines}
    assert logs.next_due_s is None


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([], ""),
        ([3], "3"),
        ([0, 1], "0-1"),
        ([6, 2, 1, 0, 3], "0-3,6"),
        (range(512), "0-511"),
        (range(0, 512, 2), "0,2,4,6,8,10,12,14,16,18,20,22,...,510"),
        ([7, 7], "7"),
    ],
)
def test_ranks_are_written_as_runs(ranks: list[int], text: str) -> None:
    assert format_ranks(ranks) == text
    assert len(text) <= 40


def test_log_files_are_private_and_get_every_line(tmp_path: Path) -> None:
    files = LogFiles(tmp_path / "logs")

    files.write("trainers.0", ["one", "two \ud800"])
    files.write("trainers.0", [])
    files.write("trainers.0", ["three"])
    files.close("trainers.0")
    files.write("trainers.0", ["after a restart"])

    path = files.path("trainers.0")
    assert path.read_text() == "one\ntwo ?\nthree\nafter a restart\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    files.close()


def test_a_name_cannot_leave_the_directory(tmp_path: Path) -> None:
    files = LogFiles(tmp_path)

    for name in ("../../etc/passwd", "a/b", "..", ""):
        assert files.path(name).parent == tmp_path
        assert not files.path(name).name.startswith(".")


def test_a_file_that_cannot_be_written_warns_once_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = LogFiles(tmp_path)
    files.path("bad.0").symlink_to("/dev/full")

    with caplog.at_level(logging.WARNING):
        files.write("bad.0", ["x"])
        files.write("bad.0", ["y"])
    files.write("good.0", ["z"])

    assert len(caplog.records) == 1
    assert "no longer kept" in caplog.text
    assert files.path("good.0").read_text() == "z\n"
    files.close()


def test_closing_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    files = LogFiles(tmp_path)
    for rank in range(3):
        files.write(f"w.{rank}", ["x"])

    files.close()
    files.close("never.opened")

    assert len(os.listdir("/proc/self/fd")) == before
