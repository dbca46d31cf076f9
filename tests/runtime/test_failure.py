"""The record of a failure: what it says, and that it survives every way it travels."""

from __future__ import annotations

import pickle
import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danaus.runtime.failure import FailureKind, MeshFailure, pack_failure, unpack_failure

TEXTS = st.text(max_size=20)
FAILURES = st.recursive(
    st.none(),
    lambda causes: st.builds(
        MeshFailure,
        kind=st.sampled_from(FailureKind),
        mesh=TEXTS,
        rank=st.none() | st.integers(0, 1 << 20),
        dims=st.lists(st.tuples(TEXTS, st.integers(1, 64)), max_size=3).map(tuple),
        host=TEXTS,
        pid=st.none() | st.integers(1, 1 << 22),
        incarnation=st.integers(0, 100),
        exit_code=st.none() | st.integers(0, 255),
        signum=st.none() | st.integers(1, 70),
        log_tail=st.lists(TEXTS, max_size=3).map(tuple),
        traceback=TEXTS,
        detail=TEXTS,
        cause=causes,
        at_s=st.floats(0, 1e10),
    ),
    max_leaves=4,
).filter(lambda failure: failure is not None)


def killed(rank: int | None = 3, **fields: Any) -> MeshFailure:
    default: dict[str, Any] = {"host": "node7", "pid": 4242, "signum": signal.SIGKILL.value}
    return MeshFailure(kind=FailureKind.KILLED, mesh="trainers", rank=rank, **default | fields)


@given(failure=FAILURES)
def test_a_failure_and_its_causes_can_be_pickled(failure: MeshFailure) -> None:
    copy = pickle.loads(pickle.dumps(failure))

    assert copy == failure
    assert [each.at_s for each in copy.chain()] == [each.at_s for each in failure.chain()]


@given(failure=FAILURES)
def test_a_failure_and_its_causes_can_be_packed(failure: MeshFailure) -> None:
    copy = unpack_failure(pack_failure(failure))

    assert copy == failure
    assert hash(copy) == hash(failure)
    assert type(copy.kind) is FailureKind
    assert [each.at_s for each in copy.chain()] == [each.at_s for each in failure.chain()]


@given(failure=FAILURES)
def test_every_failure_can_be_told(failure: MeshFailure) -> None:
    assert failure.who in str(failure)
    assert failure.how in str(failure)
    assert all(each.how in failure.report() for each in failure.chain())


def test_when_it_was_seen_is_no_part_of_what_it_is() -> None:
    assert killed(at_s=1.0) == killed(at_s=2.0)


def test_its_short_form_says_who_where_how_and_its_last_words() -> None:
    failure = killed(detail="a note", log_tail=tuple(f"line {number}" for number in range(25)))

    assert str(failure).splitlines() == [
        "mesh 'trainers' rank 3 (host node7, pid 4242) was killed by SIGKILL",
        "a note",
        "its last lines:",
        *(f"  line {number}" for number in range(20, 25)),
    ]


@pytest.mark.parametrize("kind", FailureKind)
def test_its_short_form_fits_a_terminal(kind: FailureKind) -> None:
    traceback = "Traceback (most recent call last):\n  ...\nValueError: no data" if kind.value.endswith("error") else ""
    fields: dict[str, Any] = {"kind": kind, "host": "gpu031", "pid": 41234, "exit_code": 1, "signum": 9}
    cause = MeshFailure(mesh="loaders", rank=12, traceback=traceback, **fields)
    failure = MeshFailure(mesh="trainers", rank=63, traceback=traceback, cause=cause, **fields)

    assert max(map(len, str(failure).splitlines())) <= 100


def test_its_long_form_has_all_lines_the_traceback_and_the_causes() -> None:
    cause = killed(5, log_tail=("bye",))
    failure = MeshFailure(
        kind=FailureKind.ACTOR_ERROR,
        mesh="loaders",
        rank=1,
        host="node8",
        log_tail=tuple(f"line {number}" for number in range(25)),
        traceback="Traceback (most recent call last):\n  ...\nConnectionError: gone",
        cause=cause,
    )

    report = failure.report()

    assert "it follows from: mesh 'trainers' rank 5 was killed by SIGKILL" in report
    assert all(f"  line {number}\n" in report for number in range(25))
    assert "remote traceback:\nTraceback (most recent call last):\n  ...\nConnectionError: gone" in report
    assert report.endswith(cause.report())


def test_the_stacks_of_a_stuck_rank_are_called_that() -> None:
    failure = MeshFailure(kind=FailureKind.STUCK, mesh="m", rank=0, host="h", traceback="Thread 1")

    assert "stacks of its threads:\nThread 1" in failure.report()
    assert not failure.kind.is_death


@pytest.mark.parametrize(
    ("fields", "how"),
    [
        ({"kind": FailureKind.KILLED, "signum": signal.SIGSEGV.value}, "was killed by SIGSEGV"),
        ({"kind": FailureKind.KILLED, "signum": 4711}, "was killed by signal 4711"),
        ({"kind": FailureKind.EXITED, "exit_code": 3}, "exited with code 3"),
        ({"kind": FailureKind.INIT_ERROR, "traceback": "x\nValueError: no\n"}, "failed (init error): ValueError: no"),
        ({"kind": FailureKind.HOST_LOST}, "failed (host lost)"),
        ({"kind": FailureKind.OUT_OF_MEMORY}, "was killed by the kernel: out of memory (OOM)"),
    ],
)
def test_the_end_in_words(fields: dict[str, Any], how: str) -> None:
    assert MeshFailure(mesh="m", rank=0, host="h", **fields).how == how


def test_a_later_incarnation_is_named() -> None:
    assert killed(incarnation=2).who == "mesh 'trainers' rank 3 (incarnation 2)"
    assert killed(None).who == "mesh 'trainers'"


def test_where_it_lies_in_its_mesh() -> None:
    failure = killed(dims=(("pp", 2), ("dp", 4)))

    assert failure.region is not None
    assert list(failure.region.ranks()) == [3]
    assert failure.point is not None
    assert dict(failure.point) == {"pp": 0, "dp": 3}


def test_a_whole_mesh_is_a_region_where_its_dimensions_are_known() -> None:
    whole = killed(None, dims=(("pp", 2), ("dp", 2)))

    assert whole.region is not None
    assert list(whole.region.ranks()) == [0, 1, 2, 3]
    assert whole.point is None
    assert killed(None).region is killed().point is None


def test_the_root_is_where_the_chain_ends() -> None:
    root = killed(0)
    middle = killed(1, cause=root)
    last = killed(2, cause=middle)

    assert last.root == middle.root == root.root == root
    assert list(last.chain()) == [last, middle, root]
