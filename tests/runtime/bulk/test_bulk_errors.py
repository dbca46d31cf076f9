"""Errors of transfers cross process boundaries, and say what to do."""

from __future__ import annotations

import pickle

import pytest

from danaus import DanausError, SupervisionError
from danaus.runtime.bulk.errors import BufferDropped, OwnerDied, TransferError, TransferTimeoutError
from danaus.runtime.failure import FailureKind, MeshFailure

FAILURE = MeshFailure(kind=FailureKind.KILLED, mesh="owners", rank=3, host="far", signum=9)


@pytest.mark.parametrize(
    "error",
    [
        BufferDropped("the buffer"),
        TransferError("the buffer", "a reason"),
        TransferTimeoutError("the buffer", 0.5, 3, 10, "refused"),
        OwnerDied("the buffer", FAILURE),
    ],
)
def test_errors_can_be_pickled_and_name_the_buffer(error: DanausError) -> None:
    again = pickle.loads(pickle.dumps(error))

    assert type(again) is type(error)
    assert vars(again) == vars(error)
    assert str(again) == str(error)
    assert str(error).startswith("the buffer: ")


def test_a_time_limit_is_a_timeout_and_a_death_a_supervision_error() -> None:
    assert isinstance(TransferTimeoutError("b", 1, 0, 1), TimeoutError)
    died = OwnerDied("b", FAILURE)

    assert isinstance(died, SupervisionError)
    assert died.failure is FAILURE
    assert "rank 3 (host far) was killed by SIGKILL" in str(died)
