"""Who takes whose state after a loss, and who has come for what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danaus.actors.agreement import NUM_NUMBERS, Kind, LoadCheckpoint, NothingSoundError, Report, Transfer, Work, decide


def report(step: int, *, lineage: int = 0, sound: bool = True, checkpoint: int = 0, work: Work | None = None) -> Report:
    return Report(lineage, step, sound, checkpoint, work=work or Work())


def transfer(*reports: Report) -> Transfer:
    plan = decide(reports)
    assert isinstance(plan, Transfer)
    return plan


def test_equal_ranks_have_nothing_to_hand_over() -> None:
    plan = transfer(report(7), report(7))

    assert plan == Transfer((0, 7), {}, None, (Work(), Work()))
    assert plan.is_common


def test_the_highest_step_wins_and_those_at_it_are_left_alone() -> None:
    assert transfer(report(6), report(7), report(0), report(7)).sources == {0: 1, 2: 3}


def test_those_ahead_share_the_work_of_handing_over() -> None:
    assert transfer(report(0), report(0), report(0), report(5), report(5)).sources == {0: 3, 1: 4, 2: 3}


def test_a_replica_whose_update_was_cut_short_takes_a_state_whatever_its_step() -> None:
    assert transfer(report(7, sound=False), report(6)).sources == {0: 1}


def test_a_checkpoint_that_was_loaded_wins_over_later_steps() -> None:
    assert transfer(report(3, lineage=1), report(50)).sources == {1: 0}


def test_a_peer_is_preferred_to_a_newer_checkpoint() -> None:
    assert transfer(report(0, checkpoint=9), report(2, checkpoint=9)).sources == {0: 1}


def test_with_no_peer_left_the_rank_with_the_newest_checkpoint_reads_it() -> None:
    assert decide([report(0, checkpoint=4), report(0, checkpoint=8), report(0, checkpoint=8)]) == LoadCheckpoint(1, 8)
    assert decide([report(5, sound=False, checkpoint=4)]) == LoadCheckpoint(0, 4)


def test_without_anything_the_run_starts_from_the_beginning_unless_it_was_spoilt() -> None:
    assert transfer(report(0), report(0, sound=False)).sources == {1: 0}
    with pytest.raises(NothingSoundError, match=r"call load\(path\), or spawn"):
        decide([report(0, sound=False), report(3, sound=False)])


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        (Work(), Work(Kind.STEP, 6)),
        (Work(), Work(Kind.STEP)),
        (Work(), Work(Kind.EVALUATE)),
        (Work(Kind.STEP, 5), Work(Kind.STEP, 6)),
        (Work(Kind.STEP, 5), Work(Kind.EVALUATE)),
        (Work(Kind.EVALUATE), Work(Kind.STEP, 6)),
    ],
)
def test_the_work_that_was_called_later_is_what_all_are_to_do(older: Work, newer: Work) -> None:
    plan = transfer(report(5, work=newer), report(5, work=older))

    assert plan.work == newer.left(5)
    assert not plan.is_common


def test_a_step_that_is_done_already_is_no_work_any_more() -> None:
    plan = transfer(report(5, work=Work(Kind.STEP, 5)), report(4, work=Work(Kind.STEP, 5)))

    assert plan.works == (Work(), Work())


def test_one_more_step_is_the_one_after_the_highest() -> None:
    plan = transfer(report(5, work=Work(Kind.STEP)), report(4, work=Work(Kind.STEP, 6)))

    assert plan.works == (Work(Kind.STEP, 6),) * 2


def test_an_evaluation_that_one_rank_has_completed_is_not_done_again() -> None:
    evaluated = Report(0, 5, is_evaluated=True)
    waiting = Report(0, 5, work=Work(Kind.EVALUATE))

    assert transfer(waiting, evaluated) == Transfer((0, 5), {}, 1, (Work(), Work()))
    assert transfer(waiting, Report(0, 4, is_evaluated=True)).works == (Work(Kind.EVALUATE, 5), Work())


reports_st = st.lists(
    st.builds(
        Report,
        lineage=st.integers(0, 2),
        step=st.integers(0, 3),
        is_sound=st.booleans(),
        checkpoint_step=st.integers(0, 3),
        is_evaluated=st.booleans(),
        work=st.builds(Work, st.sampled_from(Kind), st.integers(0, 4)),
    ),
    min_size=1,
    max_size=6,
)


@given(reports_st)
def test_afterwards_all_have_a_state_that_was_sound_and_nothing_later_is_lost(reports: list[Report]) -> None:
    try:
        plan = decide(reports)
    except NothingSoundError:
        assert not any(each.is_sound or each.checkpoint_step for each in reports)
        return
    if isinstance(plan, LoadCheckpoint):
        assert all(each.place <= (0, 0) for each in reports)
        assert reports[plan.rank].checkpoint_step == plan.step == max(each.checkpoint_step for each in reports)
        return
    for rank, each in enumerate(reports):
        owner = reports[plan.sources.get(rank, rank)]
        assert owner.is_sound
        assert owner.place == plan.place == max(other.place for other in reports)
        assert rank not in plan.sources.values() or each.place == plan.place


@given(reports_st)
def test_a_report_survives_as_numbers(reports: list[Report]) -> None:
    assert [Report.from_numbers(each.to_numbers()) for each in reports] == reports
    assert {len(each.to_numbers()) for each in reports} == {NUM_NUMBERS}
