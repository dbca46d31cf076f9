"""The exception tree: every error can be pickled, keeps its fields, and names its values; and how failures read."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import pickle
import re
import signal
from typing import Any

import pytest

import danaus
from danaus.runtime import errors
from danaus.runtime.calls.replies import load_reply
from danaus.runtime.errors import (
    ActorError,
    AdmissionError,
    CallCancelledError,
    CallTimeoutError,
    DanausError,
    DeadlockError,
    GroupBroken,
    MailboxFull,
    MessageError,
    SpawnError,
    StoppedError,
    SupervisionError,
)
from danaus.runtime.failure import FailureKind, MeshFailure, pack_failure, unpack_failure
from danaus.runtime.invoke import dump_error, local_traceback
from danaus.runtime.messages import wire
from danaus.runtime.messages.attachment import load_body
from danaus.runtime.supervision.waits import Wait

REMOTE = 'Traceback (most recent call last):\n  File "job.py", line 3, in step\nValueError: too large\n'
KILLED = MeshFailure(
    kind=FailureKind.KILLED,
    mesh="trainers",
    rank=3,
    host="gpu7",
    pid=4711,
    signum=signal.SIGKILL,
    log_tail=("step 1", "step 2"),
)
CIRCLE = (
    Wait("a.0", "a-1", 1, 10.0, "a rank 0", "f", "gpu7", 32, "b.g"),
    Wait("b.1", "b-1", 1, 10.5, "b rank 1", "g", "gpu8", 33, "a.f"),
)

# One of each, with what its text has to name.
EXAMPLES: list[tuple[DanausError, list[str]]] = [
    (DanausError("text"), ["text"]),
    (
        ActorError("trainers.step on rank 3", ValueError("too large"), REMOTE),
        ["trainers.step on rank 3", REMOTE.strip()],
    ),
    (ActorError("trainers.step on rank 3", None, REMOTE), ["raised ValueError: too large", "job.py"]),
    (MessageError("trainers.step", TypeError("lock"), "cannot be pickled"), ["trainers.step", "cannot be pickled"]),
    (SupervisionError(KILLED, "trainers.step"), ["trainers.step", "rank 3", "gpu7", "4711", "SIGKILL", "step 2"]),
    (SupervisionError(KILLED), ["trainers", "rank 3"]),
    (
        StoppedError(MeshFailure(kind=FailureKind.STOPPED, mesh="m", rank=0, host="h"), "m.f"),
        ["m.f", "has already been stopped", "spawn"],
    ),
    (
        CallTimeoutError("trainers.step", 2.5, ("trainers rank 1", "trainers rank 3")),
        ["step", "2.5 s", "rank 1", "rank 3"],
    ),
    (CallCancelledError("trainers.step"), ["trainers.step", "cancelled"]),
    (
        DeadlockError("a.f", CIRCLE, 12.0),
        ["a.f", "a rank 0 in f", "waits for b.g on b rank 1", "gpu8", "33", "for a.f on a rank 0", "1.50 s", "pass on"],
    ),
    (MailboxFull("trainers rank 3", 16), ["trainers rank 3", "16", "await", "mailbox="]),
    (SpawnError("no memory"), ["no memory"]),
    (AdmissionError(900, 40, "900 processes of 25 MiB"), ["900 processes of 25 MiB"]),
    (GroupBroken(("dp", "pp"), 3, 4), ["dp", "pp", "3", "4"]),
]
PUBLIC = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DanausError)}


def fields_of(error: BaseException) -> dict[str, str]:
    return {name: repr(value) for name, value in vars(error).items()}


def test_there_is_an_example_of_every_error() -> None:
    assert {type(error) for error, _ in EXAMPLES} == PUBLIC


@pytest.mark.parametrize(("error", "words"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_the_text_names_the_values(error: DanausError, words: list[str]) -> None:
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize("error", [error for error, _ in EXAMPLES], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("duplicate", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_errors_can_be_pickled_and_copied_with_their_fields(error: DanausError, duplicate: Any) -> None:
    twin = duplicate(duplicate(error))

    assert type(twin) is type(error)
    assert fields_of(twin) == fields_of(error)
    assert str(twin) == str(error)


@pytest.mark.parametrize("index", range(len(EXAMPLES)), ids=lambda index: type(EXAMPLES[index][0]).__name__)
def test_a_note_on_an_error_is_pickled_with_it(index: int) -> None:
    error = pickle.loads(pickle.dumps(EXAMPLES[index][0]))
    error.add_note("seen in step 7")

    assert pickle.loads(pickle.dumps(error)).__notes__ == ["seen in step 7"]


def test_the_tree_is_drawn_in_the_docstring_as_it_is() -> None:
    drawn = re.findall(r"^ {4}((?:│ {3}| {4})*(?:├── |└── )?)(\w+)", errors.__doc__ or "", flags=re.MULTILINE)
    parents: list[str] = []
    tree: set[tuple[str, str | None]] = set()
    for indent, name in drawn:
        depth = len(indent) // 4
        tree.add((name, parents[depth - 1] if depth else None))
        parents[depth:] = [name]

    assert tree == {(kind.__name__, None if kind is DanausError else kind.__bases__[0].__name__) for kind in PUBLIC}


def test_every_error_is_public() -> None:
    for kind in PUBLIC:
        assert getattr(danaus, kind.__name__) is kind


def test_errors_are_caught_as_the_built_in_ones_that_they_are() -> None:
    assert issubclass(CallTimeoutError, TimeoutError)
    assert issubclass(CallTimeoutError, asyncio.TimeoutError)
    assert issubclass(CallCancelledError, concurrent.futures.CancelledError)
    assert issubclass(AdmissionError, ValueError)


def test_a_timeout_keeps_all_its_fields_although_an_os_error_keeps_two() -> None:
    error = pickle.loads(pickle.dumps(CallTimeoutError("m.f", 0.1, ("a", "b", "c"))))

    assert (error.endpoint, error.timeout_s, error.missing) == ("m.f", 0.1, ("a", "b", "c"))


def test_a_timeout_of_many_ranks_names_eight_and_counts_the_rest() -> None:
    text = str(CallTimeoutError("m.f", 1.0, tuple(f"m rank {rank}" for rank in range(512))))

    assert "m rank 7 and 504 more" in text
    assert "m rank 8" not in text


def test_a_timeout_of_eight_ranks_names_them_all() -> None:
    text = str(CallTimeoutError("m.f", 1.0, tuple(f"m rank {rank}" for rank in range(8))))

    assert "m rank 7" in text
    assert "more" not in text


def test_an_actor_error_has_the_remote_exception_as_its_cause() -> None:
    error = pickle.loads(pickle.dumps(EXAMPLES[1][0]))

    assert isinstance(error.__cause__, ValueError)
    assert error.__cause__ is error.exception


def test_an_exception_of_several_lines_is_named_by_its_first() -> None:
    exception = ValueError("first\nsecond")
    error = ActorError("m.f", exception, local_traceback(exception))

    assert str(error).splitlines()[0] == "m.f raised ValueError: first"


def test_an_exception_group_is_named_by_its_message() -> None:
    exception = ExceptionGroup("two failed", [ValueError("a"), KeyError("b")])
    error = ActorError("m.f", exception, local_traceback(exception))

    assert "m.f raised ExceptionGroup: two failed (2 sub-exceptions)" in str(error)
    assert "KeyError: 'b'" in str(error)


# an exception on its way to the caller


def fail_with(error: BaseException) -> None:
    raise error


def raised_by(error: BaseException, *, while_loading: bool = False) -> ActorError:
    """What the caller gets where an endpoint has raised ``error``."""
    with pytest.raises(type(error)) as caught:
        fail_with(error)
    payload = dump_error("m.f on rank 1", caught.value, while_loading=while_loading)
    assert payload.buffers == ()
    with pytest.raises(ActorError) as told:
        load_reply("m.f", wire.ERROR, payload.body, None)
    return told.value


class RefusesError(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("not me")


class CannotBeRebuiltError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} {second}")


class IsRebuiltAsTextError(Exception):
    def __reduce__(self) -> Any:
        return str, ("no exception",)


def test_the_caller_gets_the_exception_its_place_and_its_traceback() -> None:
    error = raised_by(KeyError("missing"))

    assert type(error) is ActorError
    assert error.where == "m.f on rank 1"
    assert isinstance(error.exception, KeyError)
    assert error.exception.args == ("missing",)
    assert "in fail_with" in error.remote_traceback
    assert error.remote_traceback.endswith("KeyError: 'missing'\n")


@pytest.mark.parametrize(
    "exception", [RefusesError("no"), CannotBeRebuiltError(1, 2), IsRebuiltAsTextError("x")], ids=repr
)
def test_an_exception_that_cannot_travel_is_told_by_its_text(exception: Exception) -> None:
    error = raised_by(exception)

    assert error.exception is None
    assert type(exception).__name__ in str(error)


def test_an_exception_with_a_large_array_is_told_by_its_text() -> None:
    import numpy as np

    error = raised_by(ValueError(np.zeros(100_000)))

    assert error.exception is None
    assert "ValueError" in str(error)


def test_an_error_while_arguments_are_loaded_is_a_message_error() -> None:
    error = raised_by(ModuleNotFoundError("No module named 'job'"), while_loading=True)

    assert type(error) is MessageError
    assert "could not be loaded there" in str(error)
    assert "No module named 'job'" in str(error)


def test_an_error_of_another_actor_arrives_within_the_error() -> None:
    error = raised_by(SupervisionError(KILLED, "other.f"))

    assert isinstance(error.exception, SupervisionError)
    assert error.exception.failure == KILLED


def test_a_reply_that_cannot_be_loaded_here_is_a_message_error_with_the_reason() -> None:
    with pytest.raises(MessageError, match="could not be loaded here") as told:
        load_reply("m.f", wire.OK, b"no pickle", None)

    assert isinstance(told.value.exception, pickle.UnpicklingError)


def test_the_target_that_is_gone_is_told_by_its_failure() -> None:
    with pytest.raises(SupervisionError) as told:
        load_reply("m.f", wire.GONE, pack_failure(KILLED), None)

    assert (told.value.failure, told.value.endpoint) == (KILLED, "m.f")
    assert not isinstance(told.value, StoppedError)


def test_the_target_that_was_stopped_is_a_stopped_error() -> None:
    failure = MeshFailure(kind=FailureKind.STOPPED, mesh="m", rank=0, host="h")

    with pytest.raises(StoppedError):
        load_reply("m.f", wire.GONE, pack_failure(failure), None)


def test_the_frames_of_the_runtime_are_left_out_of_a_traceback() -> None:
    with pytest.raises(pickle.UnpicklingError) as caught:
        load_body(b"no pickle", None)
    of_the_runtime = caught.value.with_traceback(caught.tb.tb_next)

    text = local_traceback(of_the_runtime)

    assert "pickle data was truncated" in text or "UnpicklingError" in text
    assert "attachment.py" not in text


# failures


@pytest.mark.parametrize("kind", FailureKind)
def test_failures_of_every_kind_travel_and_read(kind: FailureKind) -> None:
    failure = MeshFailure(
        kind=kind,
        mesh="m",
        rank=None,
        host="h",
        pid=1,
        exit_code=2,
        signum=11,
        log_tail=("a",),
        traceback=REMOTE,
        detail="d",
    )

    assert unpack_failure(pack_failure(failure)) == failure
    assert pickle.loads(pickle.dumps(failure)) == failure
    assert "mesh 'm' (host h, pid 1)" in str(failure)


@pytest.mark.parametrize(
    ("fields", "how"),
    [
        ({"kind": FailureKind.KILLED, "signum": 9}, "was killed by SIGKILL"),
        ({"kind": FailureKind.KILLED, "signum": 63}, "was killed by signal 63"),
        ({"kind": FailureKind.EXITED, "exit_code": 3}, "exited with code 3"),
        ({"kind": FailureKind.STOPPED}, "has already been stopped; spawn a new one"),
        ({"kind": FailureKind.INIT_ERROR, "traceback": REMOTE}, "failed (init error): ValueError: too large"),
        (
            {"kind": FailureKind.INIT_ERROR, "traceback": f"{REMOTE}  2 > 1\ntake less"},
            "failed (init error): ValueError: too large",
        ),
        ({"kind": FailureKind.HOST_LOST}, "failed (host lost)"),
    ],
)
def test_an_end_in_words(fields: dict[str, Any], how: str) -> None:
    assert MeshFailure(mesh="m", rank=0, host="h", **fields).how == how


def test_a_failure_names_rank_place_end_detail_and_last_lines() -> None:
    failure = MeshFailure(
        kind=FailureKind.EXITED,
        mesh="m",
        rank=2,
        host="h",
        exit_code=1,
        detail="more",
        log_tail=tuple(f"line {number}" for number in range(9)),
    )

    assert str(failure).splitlines() == [
        "mesh 'm' rank 2 (host h) exited with code 1",
        "more",
        "its last lines:",
        *(f"  line {number}" for number in range(4, 9)),
    ]


def test_the_report_has_every_line_and_the_traceback() -> None:
    failure = MeshFailure(
        kind=FailureKind.ACTOR_ERROR,
        mesh="m",
        rank=2,
        host="h",
        log_tail=tuple(f"line {number}" for number in range(9)),
        traceback=REMOTE,
    )
    report = failure.report()

    assert report.startswith(str(failure))
    assert all(f"  line {number}\n" in report for number in range(9))
    assert report.endswith(REMOTE.rstrip())


def test_the_report_does_not_repeat_what_the_short_form_has() -> None:
    assert KILLED.report() == str(KILLED)
