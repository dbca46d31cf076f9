"""Reports of failures: one block per root cause, nothing twice, nothing lost."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from danaus.runtime.failure import FailureKind, MeshFailure
from danaus.runtime.supervision import reports
from danaus.runtime.supervision.reports import ALIKE_S, WAIT_S, RootCauses

if TYPE_CHECKING:
    import pytest

TRACEBACK = "Traceback (most recent call last):\n  File 'a.py', line 3\nValueError: no data at 0x{:x}"
SIZES = (("pp", 2), ("dp", 2))


def failed(rank: int | None, kind: FailureKind = FailureKind.KILLED, **fields: Any) -> MeshFailure:
    signum = 9 if kind is FailureKind.KILLED else None
    pid = None if rank is None else 400 + rank
    default: dict[str, Any] = {
        "mesh": "trainers",
        "host": "n7",
        "pid": pid,
        "signum": signum,
        "dims": SIZES,
        "at_s": 0.0,
    }
    return MeshFailure(kind=kind, rank=rank, **default | fields)


def block(*failures: MeshFailure) -> str:
    """The one text that comes of failures at one moment."""
    causes = RootCauses()
    for failure in failures:
        assert causes.on_failure(failure, 0.0) == []
    [text] = causes.flush()
    return text


def test_a_death_is_told_with_whom_where_and_what_it_wrote_last() -> None:
    assert block(failed(3, log_tail=("step 1", "step 2"))).splitlines() == [
        "mesh 'trainers' rank 3 (pp=1, dp=1, host n7, pid 403) was killed by SIGKILL",
        "  its last lines:",
        "    | step 1",
        "    | step 2",
    ]


def test_a_block_waits_a_moment_and_is_printed_once() -> None:
    causes = RootCauses()
    assert causes.on_failure(failed(0), 10.0) == []
    assert causes.next_check_s() == 10.0 + WAIT_S
    assert causes.check(10.0 + WAIT_S / 2) == []

    assert len(causes.check(10.0 + WAIT_S)) == 1
    assert causes.next_check_s() is None
    assert causes.on_failure(failed(0), 11.0) == causes.flush() == []


def test_what_followed_and_what_was_done_stand_beneath_the_root() -> None:
    causes = RootCauses()
    root = failed(3)
    others = [failed(rank, FailureKind.RESTARTED, cause=root) for rank in range(3)]
    for each in [failed(3, mesh="metrics", cause=root), root, *others]:
        causes.on_failure(each, 0.0)
    for number, each in enumerate([*others, root]):
        causes.on_repair(each, 1, 0.08 + number / 100)
    causes.on_note(root, "its owner knows", 0.1)

    [text] = causes.flush()

    assert text.splitlines()[1:] == [
        "  what followed:",
        "    mesh 'metrics' rank 3 was killed by SIGKILL",
        "    mesh 'trainers' ranks 0-2 were stopped to be restarted with their mesh",
        "  what was done:",
        "    all 4 ranks of mesh 'trainers' started again as incarnation 1 after 80 to 110 ms",
        "    its owner knows",
    ]


def test_what_comes_late_is_a_line_that_names_its_root() -> None:
    causes = RootCauses()
    root = failed(3)
    causes.on_failure(root, 0.0)
    causes.check(1.0)

    causes.on_failure(failed(1, FailureKind.ACTOR_ERROR, mesh="loader", traceback="OSError: no", cause=root), 2.0)
    causes.on_repair(root, 1, 2.1)
    causes.on_note(root, "all is well", 2.1)

    assert causes.flush() == [
        "mesh 'loader' rank 1 failed (actor error): OSError: no, which follows from mesh 'trainers' rank 3",
        "mesh 'trainers' rank 3 started again as incarnation 1 after 2.1 s",
        "mesh 'trainers' rank 3: all is well",
    ]


def test_late_repairs_of_a_mesh_are_told_together() -> None:
    causes = RootCauses()
    ranks = [failed(rank, FailureKind.HOST_LOST, detail="no heartbeat") for rank in range(4)]
    for each in ranks:
        causes.on_failure(each, 0.0)
    causes.check(1.0)
    for number, each in enumerate(ranks):
        assert causes.on_repair(each, 1, 2.0 + number / 20) == []

    assert causes.check(2.2) == ["all 4 ranks of mesh 'trainers' started again as incarnation 1 after 2.0 to 2.1 s"]


def test_ranks_that_fail_for_one_reason_are_one_block_wherever_its_objects_lay() -> None:
    text = block(*(failed(rank, FailureKind.INIT_ERROR, traceback=TRACEBACK.format(rank)) for rank in (0, 1, 3)))

    assert text.splitlines() == [
        "mesh 'trainers' ranks 0-1, 3 (host n7, pids 400-401, 403) failed (init error): ValueError: no data at 0x0",
        "  remote traceback (rank 0):",
        *(f"    {line}" for line in TRACEBACK.format(0).splitlines()),
    ]


def test_a_lost_host_is_told_once_with_its_reason() -> None:
    lost = [failed(rank, FailureKind.HOST_LOST, detail="no heartbeat", host=f"n{rank // 2}") for rank in range(4)]

    assert block(*lost).splitlines() == [
        "all 4 ranks of mesh 'trainers' (hosts n0, n1) failed (host lost)",
        "  no heartbeat",
    ]


def test_one_that_fails_later_for_the_same_reason_is_told_in_a_line() -> None:
    causes = RootCauses()
    causes.on_failure(failed(0, FailureKind.INIT_ERROR, traceback=TRACEBACK), 0.0)
    causes.check(1.0)

    causes.on_failure(failed(0, FailureKind.INIT_ERROR, traceback=TRACEBACK, incarnation=1, pid=500), 2.0)
    [text] = causes.flush()

    assert "rank 0 (incarnation 1) (pp=0, dp=0, host n7, pid 500) failed (init error): ValueError" in text
    assert text.endswith("as mesh 'trainers' rank 0 before")
    assert "\n" not in text


def test_much_later_it_is_told_in_full_again() -> None:
    causes = RootCauses()
    causes.on_failure(failed(0, FailureKind.INIT_ERROR, traceback=TRACEBACK), 0.0)
    causes.flush()

    causes.on_failure(failed(1, FailureKind.INIT_ERROR, traceback=TRACEBACK), ALIKE_S + 1)

    assert "remote traceback" in causes.flush()[0]


def test_a_whole_mesh_killed_at_once_is_one_block() -> None:
    text = block(*(failed(rank, log_tail=(f"I am {rank}",)) for rank in range(4)))

    assert text.splitlines() == [
        "all 4 ranks of mesh 'trainers' (host n7, pids 400-403) were killed by SIGKILL",
        "  last lines (rank 0):",
        "    | I am 0",
    ]


def test_some_ranks_killed_at_once_are_told_each_with_their_last_lines() -> None:
    causes = RootCauses()
    for rank in range(3):
        causes.on_failure(failed(rank, log_tail=(f"I am {rank}",)), 0.0)

    texts = causes.flush()

    assert len(texts) == 3
    assert all(f"I am {rank}" in text for rank, text in enumerate(texts))


def test_a_cause_that_is_told_after_its_effect_becomes_the_root() -> None:
    causes = RootCauses()
    effect = failed(1, FailureKind.ACTOR_ERROR, traceback="RuntimeError: closed by peer")
    causes.on_failure(effect, 0.0)
    causes.on_note(effect, "seen", 0.0)
    causes.on_failure(replace(effect, cause=failed(3)), 0.1)

    [text] = causes.flush()

    assert text.splitlines() == [
        "mesh 'trainers' rank 3 (pp=1, dp=1, host n7, pid 403) was killed by SIGKILL",
        "  what followed: mesh 'trainers' rank 1 failed (actor error): RuntimeError: closed by peer",
        "  what was done: mesh 'trainers' rank 1: seen",
    ]


def test_one_that_turns_out_to_follow_from_what_was_printed_is_a_line() -> None:
    causes = RootCauses()
    causes.on_failure(failed(3), 0.0)
    causes.check(1.0)
    effect = failed(1, FailureKind.ACTOR_ERROR, traceback="RuntimeError: closed by peer")
    causes.on_failure(effect, 2.0)
    causes.on_failure(replace(effect, cause=failed(3)), 2.1)

    assert causes.check(3.0) == [
        "mesh 'trainers' rank 1 failed (actor error): RuntimeError: closed by peer, "
        "which follows from mesh 'trainers' rank 3"
    ]


def test_a_chain_is_told_from_its_root_on() -> None:
    middle = failed(0, mesh="b", dims=(), cause=failed(1, mesh="c", dims=()))
    text = block(failed(2, FailureKind.ACTOR_ERROR, traceback="ValueError: a", cause=middle))

    assert text.splitlines() == [
        "mesh 'c' rank 1 (host n7, pid 401) was killed by SIGKILL",
        "  what followed:",
        "    mesh 'b' rank 0 was killed by SIGKILL",
        "      mesh 'trainers' rank 2 failed (actor error): ValueError: a",
    ]


def test_the_record_that_tells_more_is_the_one_printed() -> None:
    root = failed(0, log_tail=("last words",))

    assert "last words" in block(failed(1, mesh="x", cause=replace(root, log_tail=())), root)


def test_a_stuck_rank_is_told_with_its_stacks_and_its_end_beneath() -> None:
    stuck = failed(2, FailureKind.STUCK, detail="stopped for 2 s", traceback="Thread 1:\n  File 'a.py'")

    assert block(stuck, failed(2, cause=stuck)).splitlines()[1:] == [
        "  stopped for 2 s",
        "  stacks of its threads:",
        "    Thread 1:",
        "      File 'a.py'",
        "  what followed: mesh 'trainers' rank 2 was killed by SIGKILL",
    ]


def test_a_process_may_be_stuck_again() -> None:
    causes = RootCauses()
    for at_s in (1.0, 5.0):
        stuck = failed(2, FailureKind.STUCK, at_s=at_s)
        for _ in range(2):
            causes.on_failure(stuck, at_s)
            causes.on_note(stuck, "it answers again", at_s)
        assert [text.count("answers again") for text in causes.flush()] == [1]


def test_what_its_owner_stopped_is_no_news() -> None:
    causes = RootCauses()

    assert causes.on_failure(failed(0, FailureKind.STOPPED), 0.0) == causes.flush() == []


def test_a_note_on_something_unheard_of_tells_that_first() -> None:
    causes = RootCauses()
    causes.on_note(failed(None, pid=None), "given up", 0.0)

    assert causes.flush() == ["mesh 'trainers' (host n7) was killed by SIGKILL\n  what was done: given up"]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "_MAX_KNOWN", 10)
    causes = RootCauses()
    for incarnation in range(100):
        causes.on_failure(failed(0, incarnation=incarnation, detail=f"{incarnation}"), incarnation)
    causes.flush()

    assert len(causes._blocks) == 10
    assert len(causes._alike) == 10


ROOTS = st.builds(
    lambda rank, mesh, kind, detail: failed(rank, kind, mesh=mesh, detail=detail),
    rank=st.integers(0, 3),
    mesh=st.sampled_from("ab"),
    kind=st.sampled_from([FailureKind.KILLED, FailureKind.STUCK]),
    detail=st.sampled_from(["", "why"]),
)
CHAINS = st.lists(ROOTS, min_size=1, max_size=3)
STEPS = st.lists(st.tuples(CHAINS, st.integers(0, 2), st.sampled_from([0.0, 0.0, 0.05, 0.3])), max_size=20)


def chained(failures: list[MeshFailure]) -> MeshFailure:
    """The last one, caused by the one before it, and so on; each one at most once."""
    by_who = {(each.kind, each.mesh, each.rank): each for each in failures}
    failure, *others = by_who.values()
    for each in others:
        failure = replace(each, cause=failure)
    return failure


@settings(deadline=None, max_examples=100)
@given(steps=STEPS)
def test_every_failure_and_note_comes_out_exactly_once(steps: list[tuple[list[MeshFailure], int, float]]) -> None:
    causes, now_s = RootCauses(), 0.0
    texts: list[str] = []
    heard: set[tuple[str, int | None, FailureKind]] = set()
    notes: set[str] = set()
    for failures, note, later_s in steps:
        now_s += later_s
        failure = chained(failures)
        texts += causes.on_failure(failure, now_s)
        heard |= {(each.mesh, each.rank, each.kind) for each in failure.chain()}
        if note:
            notes.add(f"note {note} on {failure.mesh}{failure.rank}{failure.kind}.")
            texts += causes.on_note(failure, f"note {note} on {failure.mesh}{failure.rank}{failure.kind}.", now_s)
    texts += causes.flush()

    text = "\n".join(texts)
    assert all(text.count(note) == 1 for note in notes)
    assert causes.next_check_s() is None
    told = sum(count_told(line) for line in text.splitlines())
    assert told == len(heard)


def count_told(line: str) -> int:
    """Failures that a line tells of."""
    line = line.removeprefix("  what followed:").strip()
    if not line.startswith(("mesh '", "all ")) or not any(how in line for how in (" killed by", " stuck: ")):
        return 0
    line = line.split(", as ")[0].split(", which follows")[0]
    if line.startswith("all "):
        return 4
    ranks = line.partition(" rank")[2].removeprefix("s").split("(")[0].split(" was")[0].split(" is")[0]
    spans = ranks.split(" were")[0].split(" are")[0].split(",")
    return sum(
        int(span.partition("-")[2] or span.partition("-")[0]) - int(span.partition("-")[0]) + 1 for span in spans
    )
