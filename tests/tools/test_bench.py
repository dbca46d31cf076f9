"""The benchmark's own logic; of its figures only that there are some."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danaus.tools.bench import compare, limits, main, record, session, table
from danaus.tools.bench.lab import QUICK, Lab, Measure, in_turns
from danaus.tools.bench.peers import load_peer
from danaus.tools.bench.placement import Placement, descendants, placed
from danaus.tools.bench.record import Record
from danaus.tools.bench.rows import Goal, Result, Row, Verdict, goal_text, judge, percentile
from danaus.tools.bench.subject import AbsentError, Group, TorchUse

CALL = Row(
    name="call", title="a call", unit="us", limit_name="ZeroMQ", goal=Goal(times=2.5, p99_times_p50=3.0), anchor=40.0
)
RATE = Row(
    name="rate",
    title="calls in flight",
    unit="/s",
    limit_name="DEALER",
    goal=Goal(times=0.2),
    anchor=290e3,
    more_is_better=True,
)
COPY = Row(
    name="copy", title="64 MiB", unit="ms", limit_name="memcpy", goal=Goal(times=2.0), anchor=4.5, base_name="the sum"
)
DEATH = Row(name="death", title="a death", unit="ms", goal=Goal(at_most=5, p99_at_most=15))


def test_percentiles_interpolate_between_the_two_nearest_samples() -> None:
    assert percentile([10.0, 20.0, 30.0, 40.0], 50) == 25.0
    assert percentile([3.0, 1.0, 2.0], 100) == 3.0
    assert percentile([7.0], 99) == 7.0


@given(st.lists(st.floats(-1e9, 1e9), min_size=1), st.floats(0, 100))
def test_a_percentile_lies_among_the_samples(samples: list[float], percent: float) -> None:
    slack = 1e-6 * max(1.0, *map(abs, samples))

    assert min(samples) - slack <= percentile(samples, percent) <= max(samples) + slack


@pytest.mark.parametrize(("samples", "percent"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_a_percentile_of_nothing_or_outside_the_range_is_refused(samples: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="percent"):
        percentile(samples, percent)


def test_a_row_within_its_ratio_is_reached() -> None:
    judgement = judge(CALL, Result(samples=[90.0] * 10, limit=[40.0] * 10))

    assert judgement.verdict is Verdict.REACHED
    assert (judgement.p50, judgement.p99, judgement.limit, judgement.ratio) == (90.0, 90.0, 40.0, 2.25)


def test_a_row_beyond_its_ratio_is_missed_and_says_by_how_much() -> None:
    judgement = judge(CALL, Result(samples=[120.0], limit=[40.0]))

    assert judgement.verdict is Verdict.MISSED
    assert judgement.why == "3.00 x, at most 2.5 wanted"


def test_a_long_tail_alone_misses_the_goal() -> None:
    judgement = judge(CALL, Result(samples=[50.0] * 50 + [900.0] * 50, limit=[400.0 / 10]))
    tail = judge(DEATH, Result(samples=[3.0] * 90 + [16.0] * 10))

    assert judgement.verdict is Verdict.MISSED
    assert tail.verdict is Verdict.MISSED
    assert tail.why == "p99 16 ms, at most 15 wanted"


def test_a_rate_must_be_at_least_its_share_of_the_limit_and_its_p99_is_the_slow_end() -> None:
    good = judge(RATE, Result(samples=[70e3, 80e3, 90e3], limit=[300e3]))
    poor = judge(RATE, Result(samples=[40e3], limit=[300e3]))

    assert good.verdict is Verdict.REACHED
    assert good.p99 is not None
    assert good.p99 < 71e3
    assert poor.verdict is Verdict.MISSED


def test_a_limit_half_again_worse_than_on_record_voids_the_row() -> None:
    at_the_edge = judge(CALL, Result(samples=[90.0], limit=[60.0]))
    over_it = judge(CALL, Result(samples=[90.0], limit=[60.1]))
    slow = judge(RATE, Result(samples=[90e3], limit=[190e3]))

    assert at_the_edge.verdict is Verdict.REACHED
    assert over_it.verdict is Verdict.VOID
    assert over_it.why == "noisy machine: ZeroMQ 60.1 us, on record 40"
    assert slow.verdict is Verdict.VOID


def test_a_faster_limit_than_on_record_voids_nothing() -> None:
    assert judge(CALL, Result(samples=[50.0], limit=[20.0])).verdict is Verdict.REACHED


def test_the_sum_of_the_bytes_is_taken_off_before_the_ratio() -> None:
    judgement = judge(COPY, Result(samples=[10.0], limit=[4.0], base=[2.0]))

    assert judgement.ratio == 2.0
    assert judgement.verdict is Verdict.REACHED


def test_rows_without_goal_samples_or_success_say_so() -> None:
    assert judge(replace(CALL, goal=None), Result(samples=[1.0])).verdict is Verdict.MEASURED
    assert judge(CALL, Result(absent="no meshes")).why == "no meshes"
    assert judge(CALL, Result(absent="no meshes")).verdict is Verdict.ABSENT
    assert judge(CALL, Result(error="boom")).verdict is Verdict.FAILED
    assert judge(CALL, Result(samples=[1.0])).why == "no limit was measured"


def test_goals_read_as_in_the_documents() -> None:
    assert goal_text(CALL) == "<= 2.5 x, p99 <= 3 x p50"
    assert goal_text(RATE) == ">= 0.2 x"
    assert goal_text(COPY) == "<= 2 x + the sum"
    assert goal_text(DEATH) == "<= 5 ms, p99 <= 15 ms"


def test_a_goal_without_content_and_a_row_with_a_strange_unit_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Goal()
    with pytest.raises(ValueError, match="furlong"):
        Row(name="x", title="x", unit="furlong")


def some_record(*rows: tuple[Row, Result]) -> Record:
    machine = {"processor": "abacus", "cores": "2", "memory": "1 GiB", "system": "Linux"}
    return Record(
        subject="Danaus", date="today", effort="quick", machine=machine, versions={"python": "3.11"}, rows=rows
    )


def test_a_record_survives_json() -> None:
    old = some_record(
        (CALL, Result(samples=(1.0, 2.0), limit=(3.0,), beside={"memcpy": (0.5,)})),
        (replace(COPY, goal=None), Result(error="boom")),
    )

    new = record.from_json(record.to_json(old))

    assert new.rows == list(old.rows)
    assert replace(new, rows=()) == replace(old, rows=())


def test_json_carries_the_summary_for_other_readers() -> None:
    fields = json.loads(record.to_json(some_record((CALL, Result(samples=[90.0], limit=[40.0])))))

    assert fields["rows"][0]["summary"]["verdict"] == "reached"
    assert fields["rows"][0]["summary"]["ratio"] == 2.25


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99, "rows": []}'])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no record|format"):
        record.from_json(text)


def test_the_row_table_of_every_measure_survives_json() -> None:
    rows = [(row, Result(absent="not run")) for measure in session.MEASURES for row in measure.rows]

    assert record.from_json(record.to_json(some_record(*rows))).rows == rows


def test_a_comparison_prefers_ratios_and_puts_the_worst_first() -> None:
    old = [(CALL, Result(samples=[80.0], limit=[40.0])), (DEATH, Result(samples=[2.0]))]
    new = [(CALL, Result(samples=[120.0], limit=[40.0])), (DEATH, Result(samples=[4.0]))]

    found = compare.regressions(old, new)

    assert [str(each) for each in found] == [
        "a death: 2 -> 4 ms (2.00 times worse)",
        "a call: 2 -> 3 x (1.50 times worse)",
    ]


def test_a_slower_machine_is_no_regression() -> None:
    old = [(CALL, Result(samples=[80.0], limit=[30.0]))]
    new = [(CALL, Result(samples=[150.0], limit=[57.0]))]

    assert compare.regressions(old, new) == []


def test_lower_rates_are_regressions_and_higher_ones_are_not() -> None:
    slow, fast = Result(samples=[50e3], limit=[300e3]), Result(samples=[90e3], limit=[300e3])

    assert len(compare.regressions([(RATE, fast)], [(RATE, slow)])) == 1
    assert compare.regressions([(RATE, slow)], [(RATE, fast)]) == []


def test_void_new_and_vanished_rows_are_not_compared() -> None:
    good, noisy = Result(samples=[80.0], limit=[40.0]), Result(samples=[800.0], limit=[100.0])

    assert compare.regressions([(CALL, good)], [(CALL, noisy), (DEATH, Result(samples=[9.0]))]) == []
    assert compare.regressions([(CALL, good)], [(CALL, Result(error="boom"))]) == []


def test_names_of_rows_are_unique_and_every_size_of_an_effort_has_its_row() -> None:
    names = [row.name for measure in session.MEASURES for row in measure.rows]

    assert len(names) == len(set(names))
    assert {"argument-64-MiB-numpy", "reply-1-KiB-torch", "kill-second", "round-trip-one-core"} <= set(names)


def test_measures_are_chosen_by_the_start_of_their_name_or_of_a_rows_name() -> None:
    chosen = session.choose(session.MEASURES, ["kill-second, spawn-8", "import"], large=False)

    assert [measure.name for measure in chosen] == ["import", "spawn-8", "spawn-8-torch", "kill"]


def test_five_hundred_procs_start_only_on_request() -> None:
    small = session.choose(session.MEASURES, [], large=False)
    by_name = session.choose(session.MEASURES, ["scale"], large=False)

    assert "scale" not in {measure.name for measure in small}
    assert [measure.name for measure in by_name] == ["scale"]


def test_a_name_that_fits_nothing_lists_the_measures() -> None:
    with pytest.raises(ValueError, match=r"no measure starts so; there are memory-torch, .*round-trip"):
        session.choose(session.MEASURES, ["rond-trip"], large=False)


def test_blocks_take_turns_and_the_warm_up_is_dropped() -> None:
    order: list[str] = []

    def block(name: str) -> list[float]:
        order.append(name)
        return [float(len(order))]

    samples = in_turns(2, lambda: block("runtime"), lambda: block("limit"))

    assert order == ["runtime", "limit"] * 3
    assert samples == [[3.0, 5.0], [4.0, 6.0]]


def test_rows_that_a_failing_measure_leaves_open_carry_its_error_and_others_stay() -> None:
    lab = Lab(FakeSubject(), QUICK, say=lambda _: None)

    def half(lab: Lab) -> None:
        lab.record(CALL, [90e-6], limit=[40e-6])
        raise TimeoutError("nothing after 60 s")

    session.run_measure(lab, Measure(name="half", rows=(CALL, DEATH), run=half))

    assert judge(CALL, lab.results["call"]).ratio == pytest.approx(2.25)
    assert lab.results["death"].error == "TimeoutError: nothing after 60 s"


def test_what_a_runtime_lacks_is_absent_and_not_failed() -> None:
    lab = Lab(FakeSubject(), QUICK, say=lambda _: None)

    def missing(_lab: Lab) -> None:
        raise AbsentError("no broadcast")

    session.run_measure(lab, Measure(name="missing", rows=(RATE,), run=missing))

    assert judge(RATE, lab.results["rate"]).verdict is Verdict.ABSENT


class FakeSubject:
    """A runtime that cannot do anything."""

    name = package = "fake"

    def open(self) -> None: ...

    def close(self) -> None: ...

    def spawn(self, num_procs: int, *, torch: bool = False, actors: int = 1) -> Group:
        raise AbsentError(f"{num_procs}, {torch}, {actors}")

    def daemons(self, workers: object) -> dict[str, list[int]]:
        raise AbsentError(str(workers))

    def script(self, num_procs: int, torch: TorchUse) -> str:
        raise AbsentError(f"{num_procs}, {torch}")


def test_the_table_shows_ratio_goal_and_verdict_and_notes_say_why() -> None:
    rich_console = pytest.importorskip("rich.console")
    rows = [(CALL, Result(samples=[120.0], limit=[40.0], beside={"memcpy": [7.0]})), (DEATH, Result(error="boom"))]
    console = rich_console.Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115

    console.print(table.build(some_record(*rows)))
    console.file.close()

    text = console.export_text()
    assert "120 us" in text
    assert "3.00" in text
    assert "missed" in text
    assert table.notes(rows) == [
        "a call: missed: 3.00 x, at most 2.5 wanted",
        "a call: beside it memcpy 7 us",
        "a death: failed: boom",
    ]


def test_an_unknown_peer_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="monarch, ray"):
        load_peer("dask")


def test_a_peer_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(ImportError, match=r"pip install ray=="):
        load_peer("ray")


def test_bad_options_end_with_a_message_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "nothing-like-it"]) == 2
    assert main(["--only", "import", "--compare", str(tmp_path / "missing.json")]) == 2

    assert "no measure starts so" in capsys.readouterr().err


def test_limits_import_nothing_of_danaus() -> None:
    tree = ast.parse(Path(limits.__file__).read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]

    assert all(not (isinstance(node, ast.ImportFrom) and node.level) for node in imported)
    assert "danaus" not in {alias.name.partition(".")[0] for node in imported for alias in node.names}


def test_importing_the_command_loads_neither_torch_nor_what_it_measures_with() -> None:
    source = "import sys, danaus.tools.bench; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=15, check=True)

    assert not {"torch", "numpy", "rich", "danaus.tools.bench.session"} & set(loaded.stdout.split())


def test_raw_limits_give_figures_and_leave_no_process() -> None:
    pair, calls, nursery, segment = limits.PingPong(), limits.Calls(), limits.Nursery(), limits.Segment(1 << 16)
    with limits.closing_all(pair, calls, nursery, segment):
        nursery.fork_workers(2)
        figures = [*pair.times(3), calls.rate(10), *nursery.calls(3), nursery.stop_workers(), nursery.kill_time()]
        figures += [nursery.fork_time(2), *segment.times(2), *segment.times(2, copy_out=True)]
        children = descendants(os.getpid())

    assert all(figure > 0 for figure in figures)
    assert not set(children) & set(descendants(os.getpid()))
    assert len(children) >= 4


def test_a_block_on_one_core_moves_every_process_and_gives_the_cores_back() -> None:
    before = os.sched_getaffinity(0)
    pair = limits.PingPong()
    with limits.closing_all(pair), placed(Placement.ONE_CORE):
        inside = {frozenset(os.sched_getaffinity(pid)) for pid in (0, pair.pid)}

    assert len(inside) == 1
    assert len(inside.pop()) == 1
    assert os.sched_getaffinity(0) == before


@pytest.mark.timeout(120)
def test_one_measure_runs_from_the_command_to_the_record(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    source = "import sys; from danaus.tools.bench import main; sys.exit(main(sys.argv[1:]))"
    options = ["--quick", "--only", "round-trip-free,memory-agent", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-c", source, *options], capture_output=True, text=True, timeout=110, check=False
    )

    assert done.returncode == 0, done.stderr
    assert "call, sync endpoint, one core" in done.stdout
    rows = {row.name: result for row, result in record.read(path).rows}
    assert rows["round-trip-free"].samples
    assert rows["memory-agent"].samples
