"""Large payloads of messages between hosts: lent under a lease, fetched over a stream, given back."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
import pytest

from danaus.runtime.bulk import certificate, sharing
from danaus.runtime.bulk.errors import BufferDropped
from danaus.runtime.bulk.reference import unpack
from danaus.runtime.bulk.state import bulk_of
from danaus.runtime.failure import FailureKind, MeshFailure
from danaus.runtime.messages.attachment import LEND_FROM_BYTES, Attachments, Outgoing, load_body, size_of
from danaus.runtime.messages.payload import dump

from .stand_ins import StandIn, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

torch: Any = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

OWNER, NEIGHBOUR, FAR, FAR_TOO = "owners-1@1x2.0", "owners-1@1x2.1", "others-2@2:3x1.0", "others-2@2:3x1.1"
SHARERS = [f"sharers-3@5x4.{rank}" for rank in range(4)]
BIG = {"array": np.arange(200_001, dtype="float64"), "odd": np.ones(20_001, "uint8"), "tensor": torch.ones(300, 400)}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str], StandIn]]:
    certificate.write(str(tmp_path), certificate.mint())
    made = list[StandIn]()

    def make(proc_id: str) -> StandIn:
        local: Any = StandIn(proc_id, tmp_path)
        local.attachments = Attachments(proc_id, local)
        made.append(local)
        return local

    yield make
    for local in made:
        local.attachments.close()


def send(out: Outgoing) -> Any:
    """What of an attachment arrives in an envelope."""
    packed: bytes = msgpack.packb(out.attachment)  # pyright: ignore[reportAssignmentType]
    return msgpack.unpackb(packed)


def load(receiver: StandIn, out: Outgoing, **options: Any) -> Any:
    attachment = send(out) if out.attachment is not None and not out.frames else list(out.frames)
    return load_body(out.body, receiver.attachments.incoming(attachment), **options)


def leases(owner: StandIn) -> int:
    return owner.attachments._pool.stats().leases


def give_back(receiver: StandIn, owner: StandIn) -> None:
    for lease_ids in [receiver.attachments.take_returns().pop(owner.proc_id)]:
        owner.attachments.on_lease_returned(receiver.proc_id, lease_ids)


def test_a_payload_for_another_host_is_fetched_and_given_back_at_once(make: Callable[[str], StandIn]) -> None:
    owner, receiver = make(OWNER), make(FAR)
    out = owner.attachments.outgoing(dump(BIG), [FAR])
    assert (out.attachment[0], out.frames) == (f"bulk:{OWNER}", ())
    assert size_of(out.body, send(out)) == out.size_bytes
    assert leases(owner) == 1

    value = load(receiver, out)

    assert (value["array"] == BIG["array"]).all()
    assert (value["odd"] == BIG["odd"]).all()
    assert value["tensor"].equal(BIG["tensor"])
    give_back(receiver, owner)
    assert leases(owner) == 0


def test_arrays_are_read_only_and_tensors_private(make: Callable[[str], StandIn]) -> None:
    owner, receiver = make(OWNER), make(FAR)

    value = load(receiver, owner.attachments.outgoing(dump(BIG), [FAR]))

    assert not value["array"].flags.writeable
    assert value["array"].flags.aligned
    value["tensor"].zero_()
    assert (value["array"] == BIG["array"]).all()
    assert BIG["tensor"].sum() == 120_000


def test_one_cast_serves_this_host_and_others(make: Callable[[str], StandIn]) -> None:
    owner, neighbour, far, too = (make(name) for name in (OWNER, NEIGHBOUR, FAR, FAR_TOO))
    out = owner.attachments.outgoing(dump(BIG), [NEIGHBOUR, FAR, FAR_TOO])

    for receiver in (neighbour, far, too):
        assert (load(receiver, out)["array"] == BIG["array"]).all()
        assert (receiver.attachments.bulk is None) == (receiver is neighbour)
        assert leases(owner) == 1
        give_back(receiver, owner)

    assert leases(owner) == 0


def test_what_stays_on_one_host_has_no_way_in_its_reference(make: Callable[[str], StandIn]) -> None:
    owner = make(OWNER)

    out = owner.attachments.outgoing(dump(BIG), [NEIGHBOUR, "@spawner"])

    assert out.attachment[0] == OWNER
    assert owner.attachments.bulk is None


def test_a_small_payload_for_another_host_travels_with_its_message(make: Callable[[str], StandIn]) -> None:
    owner, receiver = make(OWNER), make(FAR)
    array = np.ones(LEND_FROM_BYTES - 1000, "uint8")

    out = owner.attachments.outgoing(dump(array), [FAR])

    assert len(out.frames) == 1
    assert (load(receiver, out) == array).all()


def test_without_a_certificate_payloads_travel_with_their_message(
    make: Callable[[str], StandIn], tmp_path: Path
) -> None:
    (tmp_path / certificate.FILE).unlink()
    owner, receiver = make(OWNER), make(FAR)

    out = owner.attachments.outgoing(dump(BIG), [FAR])

    assert len(out.frames) == 3
    assert (load(receiver, out)["array"] == BIG["array"]).all()


def test_a_certificate_that_comes_later_is_used_from_then_on(make: Callable[[str], StandIn], tmp_path: Path) -> None:
    pem = (tmp_path / certificate.FILE).read_bytes()
    (tmp_path / certificate.FILE).unlink()
    owner, receiver = make(OWNER), make(FAR)
    assert owner.attachments.outgoing(dump(BIG), [FAR]).frames

    certificate.write(str(tmp_path), pem)

    assert load(receiver, owner.attachments.outgoing(dump(BIG), [FAR]))["tensor"].equal(BIG["tensor"])


def test_a_value_that_nobody_loads_is_given_back(make: Callable[[str], StandIn]) -> None:
    owner, receiver = make(OWNER), make(FAR)
    out = owner.attachments.outgoing(dump(BIG), [FAR])

    incoming = receiver.attachments.incoming(send(out))
    assert incoming.owner == OWNER
    del incoming
    give_back(receiver, owner)

    assert leases(owner) == 0


def test_a_lease_ends_with_its_holder_and_with_the_call(make: Callable[[str], StandIn]) -> None:
    owner, receiver = make(OWNER), make(FAR)
    first, second = (owner.attachments.outgoing(dump(BIG), [FAR, FAR_TOO]) for _ in range(2))

    owner.attachments.on_proc_gone(FAR_TOO)
    owner.attachments.take_back(first, FAR)

    assert leases(owner) == 1
    with pytest.raises(BufferDropped, match=f"payload of {OWNER}"):
        load(receiver, first)
    assert (load(receiver, second)["array"] == BIG["array"]).all()


def test_a_lease_can_be_lent_again(make: Callable[[str], StandIn]) -> None:
    owner, receiver = make(OWNER), make(FAR)
    out = owner.attachments.outgoing(dump(BIG), [FAR])

    owner.attachments.lend_again(out, FAR)
    for _ in range(2):
        load(receiver, out)
        assert leases(owner) == 1
        give_back(receiver, owner)

    assert leases(owner) == 0


def test_the_owners_death_is_told_as_that_of_a_segment_is(make: Callable[[str], StandIn]) -> None:
    owner, receiver = make(OWNER), make(FAR)
    out = owner.attachments.outgoing(dump(BIG), [FAR])
    bulk_of(owner).close()  # pyright: ignore[reportArgumentType]
    receiver.gone[OWNER] = MeshFailure(kind=FailureKind.HOST_LOST, mesh="owners", rank=0, host="far")

    with pytest.raises(OSError, match="mesh 'owners' rank 0"):
        load(receiver, out)


def test_a_new_address_of_the_host_is_told_to_who_comes_then(make: Callable[[str], StandIn]) -> None:
    owner, receiver = make(OWNER), make(FAR)
    before = owner.attachments.outgoing(dump(BIG), [FAR])

    owner.host_address = "127.0.0.2"
    after = owner.attachments.outgoing(dump(BIG), [FAR])

    assert (before.attachment[1], after.attachment[1]) == ("127.0.0.1", "127.0.0.2")
    for out in (before, after):
        assert load(receiver, out)["tensor"].equal(BIG["tensor"])


def test_a_wrong_token_gets_nothing(make: Callable[[str], StandIn]) -> None:
    owner, receiver = make(OWNER), make(FAR)
    out = owner.attachments.outgoing(dump(BIG), [FAR])
    out.attachment = (*out.attachment[:4], bytes(16), *out.attachment[5:])

    with pytest.raises(BufferDropped):
        load(receiver, out)


@pytest.mark.parametrize(
    "reference", [["bulk:x"], ["bulk:x", 1, 2, 3], ["bulk:x", "h", "p", "tls", b"", [], 1], ["x", 1]]
)
def test_a_malformed_reference_is_refused(make: Callable[[str], StandIn], reference: list[Any]) -> None:
    incoming = make(FAR).attachments.incoming(reference)

    with pytest.raises(ValueError, match="not a "):
        incoming.buffers()


def wait_no_sharing() -> None:
    wait_until(lambda: not any(thread.name == "danaus-bulk-share" for thread in threading.enumerate()))


def test_one_cast_to_many_of_a_host_is_fetched_once(make: Callable[[str], StandIn]) -> None:
    owner, receivers = make(OWNER), [make(name) for name in SHARERS]
    out = owner.attachments.outgoing(dump(BIG), [*SHARERS, FAR])

    with ThreadPoolExecutor(len(receivers)) as pool:
        loading = [pool.submit(load, receiver, out) for receiver in receivers]
        values = [each.result(20) for each in loading]

    assert sum(receiver.attachments.bulk.clients.num_connected for receiver in receivers) == 1
    for receiver, value in zip(receivers, values, strict=True):
        assert (value["array"] == BIG["array"]).all()
        assert not value["array"].flags.writeable
        assert value["array"].flags.aligned
        value["tensor"].zero_()
        give_back(receiver, owner)
    assert load(make(FAR), out)["tensor"].equal(BIG["tensor"])
    wait_no_sharing()


def test_one_who_asks_late_fetches_for_itself(make: Callable[[str], StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "HAND_OUT_S", 0.01)
    owner, first, late = make(OWNER), make(SHARERS[0]), make(SHARERS[1])
    out = owner.attachments.outgoing(dump(BIG), SHARERS)

    load(first, out)
    wait_no_sharing()

    assert load(late, out)["tensor"].equal(BIG["tensor"])
    wait_no_sharing()


def test_where_the_one_that_fetches_fails_another_does_it(
    make: Callable[[str], StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "HAND_OUT_S", 0.01)
    owner, receivers = make(OWNER), [make(name) for name in SHARERS[:2]]
    out = owner.attachments.outgoing(dump(BIG), SHARERS[:2])
    begun, may_fail = threading.Event(), threading.Event()
    fetch_into = sharing.fetch_into

    def fail_once(*arguments: Any) -> None:
        if not begun.is_set():
            begun.set()
            assert may_fail.wait(20)
            raise OSError("no memory")
        fetch_into(*arguments)

    monkeypatch.setattr(sharing, "fetch_into", fail_once)
    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(load, receivers[0], out)
        assert begun.wait(20)
        waiting = pool.submit(load, receivers[1], out)
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        may_fail.set()
        with pytest.raises(OSError, match="no memory"):
            failing.result(20)
        assert waiting.result(20)["tensor"].equal(BIG["tensor"])
    wait_no_sharing()


def test_another_who_holds_the_payloads_socket_is_outlived(
    make: Callable[[str], StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "HAND_OUT_S", 0.01)
    owner, receiver = make(OWNER), make(SHARERS[0])
    out = owner.attachments.outgoing(dump(BIG), SHARERS[:2])
    with ThreadPoolExecutor(1) as pool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            other.bind(sharing._name(unpack(send(out))))
            other.listen()
            loading = pool.submit(load, receiver, out)
            other.accept()[0].close()
        assert loading.result(20)["tensor"].equal(BIG["tensor"])
    wait_no_sharing()
