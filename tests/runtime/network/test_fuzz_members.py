"""An agent that has the job's key and talks nonsense, to a real agent: what that says is dropped, and it serves on.

No stranger comes so far. It is how another version, or a fault of one host, must not end the processes of the others.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from danaus.runtime.failure import FailureKind, MeshFailure, pack_failure
from danaus.runtime.messages import wire
from danaus.runtime.network import packets
from danaus.runtime.network.door import connect
from danaus.runtime.network.keys import derive

from .daemons import ALONE, SECRET, rss_bytes, run_daemon
from .fuzzing import fuzzed

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(60)

LIMIT_S = 10.0
UNHURRIED = fuzzed(40)


class Root:
    """Speaks to the agent of slot 1 as the agent of the controller's host would."""

    def __init__(self, context: zmq.Context[Any], endpoint: str, pid: int) -> None:
        self.pid, self.seq, self.acknowledged = pid, 0, 0
        self.socket = connect(
            context,
            zmq.DEALER,
            endpoint,
            derive(SECRET, "caller", "job"),
            derive(SECRET, "listener", "job").public,
            options={zmq.ROUTING_ID: b"0.0.beef", zmq.SNDHWM: 0, zmq.RCVHWM: 0},
        )
        members = [[0, 0, "", "root"], [1, 0, endpoint, "nest"]]
        self.send([wire.pack([packets.TOPOLOGY, 1, members, [], 8, 0])])
        self.check_serves()

    def send(self, frames: list[bytes]) -> None:
        self.socket.send_multipart(frames)

    def data(self, meta: bytes, *body: bytes) -> None:
        """Send a packet under the next number."""
        self.seq += 1
        self.send([packets.pack_data(0, 0, [[1, 0, self.seq]]), meta, *body])

    def tell(self, *envelope: Any) -> None:
        """Send an envelope to the agent itself."""
        self.data(wire.pack([packets.AGENT]), wire.pack(list(envelope)))

    def check_serves(self) -> None:
        """What is sent now is acknowledged, after all that was before."""
        self.tell(wire.EVENT, "nothing of this name", {})
        deadline_s = time.monotonic() + LIMIT_S
        while self.acknowledged < self.seq:
            assert self.socket.poll(max(0, int((deadline_s - time.monotonic()) * 1000))), "the agent answers no more"
            self._take(self.socket.recv_multipart())

    def _take(self, frames: list[bytes]) -> None:
        header = packets.unpack_header(frames[0])
        if header[0] == packets.BUNDLE:
            for part in packets.split_bundle(frames, header[1]):
                self._take(part)
        elif header[0] == packets.ACK:
            self.acknowledged = max(self.acknowledged, header[5])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Root]:
    program = (sys.executable, "-m", "danaus.tools.host")
    with run_daemon(tmp_path_factory.mktemp("host"), command=program) as daemon:
        kind, fields = daemon.call().attach("garbled", env=ALONE)
        assert kind == "attached", fields
        root = Root(daemon.context, fields["endpoint"], fields["pid"])
        yield root
        root.socket.close(0)


ADDRESSES = st.sampled_from(
    ["", "a", "a.0", "a@1x2.0", "a@1x2.0~3", "agent@1x1.0", "agent@0x1.0", "controller.0", "a@9x1.0", "@x.~"]
)
ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.binary(max_size=12),
    st.text("ab.@~/x\0é", max_size=6),
    ADDRESSES,
)
KEYS = st.text("ab", max_size=3)
VALUES = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))
FAILURE = MeshFailure(kind=FailureKind.STOPPED, mesh="a", rank=0, host="nest", incarnation=0)
PLAUSIBLE: dict[str, Any] = {
    "proc": "a@1x2.0",
    "procs": ["a@1x2.0", "a@1x2.1"],
    "next": "a@1x2.0~1",
    "mesh": "a@1x2",
    "actor": "worker",
    "failure": pack_failure(FAILURE),
    "kind": "exited",
    "traceback": "",
    "state": b"state",
    "kept": {"a@1x2.0": {"worker": b"state"}},
    "restartable": True,
    "path": "/nowhere/a",
    "pid": 1,
    "port": 1,
    "token": 1,
    "number": 1,
    "signum": 0,
    "grace_s": 0.1,
    "slot": 1,
    "life": 0,
    "seconds": 1.0,
    "spares": 0,
    "boot": b"",
    "reason": "",
    "answer": {},
}
"""Fields of right types; what is changed or left out of them is nonsense."""
FIELDS = st.builds(
    lambda changed, left_out: {name: value for name, value in {**PLAUSIBLE, **changed}.items() if name not in left_out},
    st.dictionaries(st.sampled_from(sorted(PLAUSIBLE)), VALUES, max_size=4),
    st.sets(st.sampled_from(sorted(PLAUSIBLE)), max_size=2),
)
# Left out: what ends the agent because it was asked to, and what has it connect somewhere.
REQUESTS = ["spawn", "up", "watch", "failing", "signal", "stop", "stop_mesh", "restart", "abandon", "policy", "keep"]
STATES = ["recall", "forget", "ready", "pong", "drained", "take_over", "keep_copy", "attach", "detach", "nonsense"]
EVENTS = ["up", "died", "replaced", "abandoned", "joined", "silent", "ended", "attached_below", "nonsense"]


@UNHURRIED
@given(st.lists(st.tuples(st.sampled_from(REQUESTS + STATES), ADDRESSES, FIELDS), min_size=1, max_size=5))
def test_requests_with_any_fields(root: Root, requests: list[tuple[str, str, dict[str, Any]]]) -> None:
    for name, sender, fields in requests:
        root.tell(wire.REQUEST, name, sender, fields)

    root.check_serves()


@UNHURRIED
@given(st.lists(st.tuples(st.sampled_from(EVENTS), FIELDS), min_size=1, max_size=5))
def test_events_with_any_fields(root: Root, events: list[tuple[str, dict[str, Any]]]) -> None:
    for name, fields in events:
        root.tell(wire.EVENT, name, fields)

    root.check_serves()


@UNHURRIED
@given(st.lists(VALUES, max_size=5), st.binary(max_size=50))
def test_envelopes_and_bytes_of_any_kind(root: Root, values: list[Any], noise: bytes) -> None:
    root.tell(*values)
    root.data(wire.pack([packets.AGENT]), noise)
    root.data(noise, noise)
    root.data(wire.pack(values))
    root.send([noise])
    root.send([wire.pack(values), noise])

    root.check_serves()


@UNHURRIED
@given(ADDRESSES, st.lists(st.binary(max_size=30), max_size=3), st.dictionaries(st.integers(-1, 3), VALUES, max_size=3))
def test_messages_for_processes_that_are_not_there(
    root: Root, proc: str, body: list[bytes], shares: dict[int, Any]
) -> None:
    root.data(wire.pack([packets.PLAIN, proc]), *body)
    root.data(wire.pack([packets.REPLY, proc, 7]), *body)
    root.data(wire.pack([packets.CAST, {1: [[proc, 0]]}]), *body)
    root.data(wire.pack([packets.CAST, shares]), *body)

    root.check_serves()


@UNHURRIED
@given(st.lists(st.lists(VALUES, max_size=5), max_size=3), st.lists(VALUES, max_size=3), st.integers(-1, 1 << 40))
def test_topologies_of_any_kind(root: Root, members: list[Any], lost: list[Any], epoch: int) -> None:
    for fan_out, gateway in ((8, 0), (0, 0), (-1, -1), (2, 9)):
        root.send([wire.pack([packets.TOPOLOGY, epoch, members, lost, fan_out, gateway])])

    root.check_serves()


def test_after_all_that_it_is_no_larger(root: Root) -> None:
    """All of the above is a few megabytes; what malloc keeps of a growing and shrinking heap is of that size, too."""
    root.check_serves()

    assert rss_bytes(root.pid) < 80 << 20
