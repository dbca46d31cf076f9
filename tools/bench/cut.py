"""Traffic between hosts, one of which is cut off for a while: nothing may be lost, come twice or overtake."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from .cuttable import Cuttable, wait_port
from .hosts import only_danaus
from .lab import Lab, Measure
from .limits import wait_readable
from .rows import Goal, Row
from .subject import WAIT_S
from .traffic import Tally

if TYPE_CHECKING:
    from collections.abc import Generator

    from ...runtime import HostMesh

_CUT_S: Final = 5.0
_BESIDE_S: Final = 1.0
"""How long there is traffic before the cut, and after it."""
_RATE: Final = 1000.0
"""Messages a second of each sender."""
_FAR_ADDRESS: Final = "127.0.0.2"
"""Where others find the agent that they are cut off from."""


def _cut() -> Measure:
    wrong = Row(
        name="cut-wrong",
        title=f"cut of {_CUT_S:g} s under load: messages lost, doubled or out of order",
        unit="messages",
        goal=Goal(at_most=0),
    )
    late = Row(name="cut-late", title=f"cut of {_CUT_S:g} s: until nothing is late any more", unit="s")

    def run(lab: Lab) -> None:
        only_danaus(lab)
        tally, seconds = Tally(), list[float]()
        with _cuttable_hosts() as (hosts, network), hosts.spawn_procs({"p": 1}, name="bench", preload=()) as procs:
            from .host_actors import Noter

            for number in range(3 if lab.effort.thorough else 1):
                lab.say(f"{wrong.title}, {number + 1}")
                noters: Any = procs.spawn("noters", Noter)
                one, late_s = _cut_under_load(noters, network)
                tally += one
                seconds.append(late_s)
                noters.stop().get(timeout=WAIT_S)
                beside = {"sent": [float(tally.sent)], "lost": [float(tally.lost)], "doubled": [float(tally.doubled)]}
                lab.record(wrong, [tally.wrong], beside=beside | {"out of order": [float(tally.overtaken)]})
                lab.record(late, seconds)

    return Measure(name="cut", rows=(wrong, late), run=run)


def _cut_under_load(noters: Any, network: Cuttable) -> tuple[Tally, float]:
    """Send between all while the second host is cut off; return what became of it, and how late the last ones were."""
    from .host_actors import send_numbers

    count = int((_BESIDE_S + _CUT_S + _BESIDE_S) * _RATE)
    near, far = noters.slice(hosts=0), noters.slice(hosts=1)
    noters.came.call().get(timeout=WAIT_S)
    under_way = [near.send.call_one(1, far, count, _RATE), far.send.call_one(2, near, count, _RATE)]
    # The controller sends casts: one message for both.
    mine = threading.Thread(target=send_numbers, args=(0, [noters], count, _RATE))
    mine.start()
    try:
        time.sleep(_BESIDE_S)
        held = network.num_held
        network.cut()
        time.sleep(_CUT_S)
        if network.num_held == held:
            raise RuntimeError("nothing was sent during the cut")
    finally:
        network.heal()
        healed = time.perf_counter()
        mine.join(WAIT_S)
    for call in under_way:
        call.get(timeout=WAIT_S)
    expected = [(near, {0: count, 2: count}), (far, {0: count, 1: count})]
    tallies = [_wait_all(noter, sent) for noter, sent in expected]
    return tallies[0] + tallies[1], time.perf_counter() - healed - _BESIDE_S


def _wait_all(noter: Any, sent: dict[int, int]) -> Tally:
    """What is not there within ``WAIT_S`` is lost."""
    end = time.perf_counter() + WAIT_S
    while True:
        tally = Tally.of(sent, noter.came.call_one().get(timeout=WAIT_S))
        if not tally.lost or time.perf_counter() > end:
            return tally
        time.sleep(0.05)


@contextlib.contextmanager
def _cuttable_hosts() -> Generator[tuple[HostMesh, Cuttable]]:
    """Two hosts, the second of which everybody reaches through a network that can be cut."""
    from ...runtime.network.attach import attach_to_hosts
    from ...runtime.network.keys import format_key, new_secret

    secret = new_secret()
    with contextlib.ExitStack() as stack:
        daemons = [
            stack.enter_context(_daemon(format_key(secret).decode(), host)) for host in ("127.0.0.1", _FAR_ADDRESS)
        ]
        found: list[Cuttable] = []

        def stand_between() -> None:
            found.append(Cuttable(_FAR_ADDRESS, "127.0.0.1", wait_port(daemons[1][0])))
            stack.callback(found[0].close)

        # The agent says where it listens while the attaching goes on, which needs what listens there.
        thread = threading.Thread(target=stand_between, name="stand between")
        thread.start()
        try:
            hosts = attach_to_hosts([address for _, address in daemons], key=secret, timeout=WAIT_S)
        finally:
            thread.join(WAIT_S)
        stack.callback(hosts.shutdown)
        yield hosts, found[0]


@contextlib.contextmanager
def _daemon(key: str, advertised: str) -> Generator[tuple[int, str]]:
    """A daemon on this machine: its process and its own address. It tells others that it is at ``advertised``."""
    listen = ["--listen", "tcp://127.0.0.1:0", "--advertise", advertised]
    command = [sys.executable, "-m", "danaus.tools.host", *listen, "--key", "-", "--follow", str(os.getpid())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(key)
        process.stdin.close()
        wait_readable(process.stdout.fileno(), "a daemon did not say where it listens")
        port = process.stdout.readline().strip().rpartition(":")[2]
        yield process.pid, f"tcp://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(WAIT_S)
        assert process.stdout is not None
        process.stdout.close()


MEASURES: Final = (_cut(),)
