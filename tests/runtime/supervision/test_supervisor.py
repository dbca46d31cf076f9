"""The supervisor of one process: every way of a loss up the tree. The process is a fake that keeps what it is told."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from danaus.runtime.address import incarnation_of, next_address, place_of, rank_of
from danaus.runtime.calls import future
from danaus.runtime.failure import FailureKind, MeshFailure, pack_failure, unpack_failure
from danaus.runtime.messages import wire
from danaus.runtime.messages.attachment import Outgoing
from danaus.runtime.shapes.shape import Extent
from danaus.runtime.supervision import actor_supervisor, asking, supervisor, tree
from danaus.runtime.supervision.asking import LOOK_S, SUPERVISE_S
from danaus.runtime.supervision.owned import KEEPER, Change
from danaus.runtime.supervision.restart import RankState, Restart
from danaus.runtime.supervision.supervisor import Supervisor
from danaus.runtime.supervision.tree import TOLD_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OWNER = "boss-1"
MESH = "m-1"
ACTORS = "a-1"


class FakeRunner:
    """An owner: keeps what it is asked, and answers when the test says so."""

    def __init__(self, *, supervises: bool = True, creator: str | None = "controller.0/root") -> None:
        self.supervises, self.creator = supervises, creator
        self.questions: list[Any] = []
        self.abandoned = 0

    def has_hook(self, name: str) -> bool:
        assert name == "__supervise__"
        return self.supervises

    def ask(self, question: Any) -> None:
        self.questions.append(question)

    def on_abandoned(self) -> None:
        self.abandoned += 1


class FakeLocal:
    """A process that keeps what it is told; time stands still until the test moves it."""

    def __init__(self, directory: Path) -> None:
        self.proc_id, self.slot, self.host, self.now_s = "w-9.0", 0, "here", 100.0
        self.gone: dict[str, MeshFailure] = {}
        self.actors: dict[str, Any] = {}
        self.on_event: dict[str, Callable[[dict[str, Any]], None]] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.sent: list[tuple[str, wire.Envelope]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.places_lock = threading.Lock()
        self.attachments = self
        self.lent: list[str] = []
        self.taken_back: list[str] = []
        self._current: dict[str, str] = {}
        self.blocked: list[tuple[str, str]] = []
        self._waits = self
        self._directory = str(directory)

    def is_blocked_on(self, key: str, place: str) -> bool:
        return (key, place) in self.blocked

    def job_directory(self) -> str:
        return self._directory

    def resolve(self, place: str) -> str:
        return self._current.get(place, place)

    def on_replaced(self, proc: str, following: str) -> None:
        self._current[place_of(proc)] = following

    def mark_gone(self, proc: str, failure: MeshFailure) -> None:
        self.gone[proc] = failure

    def request(self, name: str, fields: dict[str, Any]) -> None:
        self.requests.append((name, fields))

    def send(self, proc: str, envelope: wire.Envelope) -> None:
        self.sent.append((proc, envelope))

    def link(self, proc: str) -> Any:
        return SimpleNamespace(
            send=lambda data, frames: self.sent.extend((proc, each) for each in wire.unpack([data, *frames]))
        )

    def run_soon(self, task: Callable[[], None]) -> None:
        task()

    def run_at(self, at_s: float, task: Callable[[], None]) -> None:
        self.timers.append((at_s, task))

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        due = [task for at_s, task in self.timers if at_s <= self.now_s]
        self.timers = [timer for timer in self.timers if timer[0] > self.now_s]
        for task in due:
            task()

    def lend_again(self, _out: Outgoing, holder: str) -> None:
        self.lent.append(holder)

    def take_back(self, _out: Outgoing, holder: str) -> None:
        self.taken_back.append(holder)

    # what was asked of the agent, and of processes:

    def named(self, name: str) -> list[Any]:
        return [fields for request, fields in self.requests if request == name]

    def started(self) -> list[list[str]]:
        return [fields["procs"] for fields in self.named("spawn")]

    def made(self) -> list[tuple[str, int]]:
        """SPAWNs of actors: to which process, and which time."""
        return [(proc, envelope[3][0]) for proc, envelope in self.sent if envelope[0] == wire.SPAWN]

    def events(self, name: str) -> list[tuple[str, dict[str, Any]]]:
        return [(proc, each[2]) for proc, each in self.sent if each[0] == wire.EVENT and each[1] == name]


class World:
    """A supervisor whose process owns a mesh of three ranks for an actor."""

    def __init__(self, local: FakeLocal) -> None:
        self.local = local
        self.supervisor = Supervisor(local)  # type: ignore[arg-type]
        self.reports: list[MeshFailure] = []
        self.notes: list[str] = []
        self.repairs: list[tuple[int | None, int]] = []
        self.changes: list[Change] = []
        self.supervisor.report = self.reports.append
        self.supervisor.note = lambda _failure, text: self.notes.append(text)
        self.supervisor.repaired = lambda failure, number: self.repairs.append((failure.rank, number))

    def own(self, policy: Restart | None = None, *, owner: FakeRunner | None = None, count: int = 3) -> FakeRunner:
        runner = self.local.actors[OWNER] = owner or FakeRunner()
        order = {
            "mesh": MESH,
            "name": "m",
            "count": count,
            "procs": [],
            "restartable": policy is not None,
            "spares": 0,
            "boot_file": "old",
        }
        self.supervisor.own_procs(order, b"boot", OWNER, policy)
        self.supervisor.procs[MESH].callbacks.append(self.changes.append)
        return runner

    def own_actors(self, policy: Restart | None = None, *, key: str = ACTORS, mesh: str = MESH) -> Any:
        region = Extent(("rank",), (3,)).region
        actors = SimpleNamespace(_procs=SimpleNamespace(_mesh_id=mesh), _region=region, _key=key, name="a")
        self.supervisor.own_actors(actors, OWNER, Outgoing(b"spawn"), policy)  # type: ignore[arg-type]
        return actors

    def die(self, proc: str, kind: FailureKind = FailureKind.KILLED, *, following: bool | None = None) -> MeshFailure:
        """What ``LocalProc.on_died`` does."""
        owned = self.supervisor.procs.get(MESH)
        if following is None:
            following = owned is not None and owned.policy is not None and kind is not FailureKind.STOPPED
        failure = MeshFailure(
            kind=kind, mesh="m", rank=rank_of(proc), host="h", incarnation=incarnation_of(proc), restarts=following
        )
        after = next_address(proc) if following else None
        if after is not None:
            self.supervisor.spawn_again(proc, after)
            self.local.on_replaced(proc, after)
        self.local.mark_gone(proc, failure)
        self.supervisor.on_proc_died(proc, failure, after)
        return failure

    def fail_actor(self, proc: str, *, times: int = 0, key: str = ACTORS) -> MeshFailure:
        incarnation = times + incarnation_of(proc)
        failure = MeshFailure(
            kind=FailureKind.ACTOR_ERROR, mesh="a", rank=rank_of(proc), host="h", incarnation=incarnation
        )
        self.local.on_event["actor_failed"]({"actor": key, "proc": proc, "failure": pack_failure(failure)})
        return failure

    def state(self, rank: int) -> RankState:
        return self.supervisor.procs[MESH].tracker.state(rank)

    def escalated(self) -> list[tuple[str, str, MeshFailure]]:
        return [
            (proc, fields["to"], unpack_failure(fields["failure"])) for proc, fields in self.local.events("escalated")
        ]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A supervisor under a clock of the test's own; callbacks run at once."""
    local = FakeLocal(tmp_path)
    clock = SimpleNamespace(monotonic=lambda: local.now_s)
    for module in (actor_supervisor, asking, supervisor, tree):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(future, "_run_apart", lambda task: task())
    return World(local)


# the owner


def test_the_owner_is_asked_first_and_once(world: World) -> None:
    owner = world.own(Restart())

    failure = world.die(f"{MESH}.1")

    [question] = owner.questions
    assert (question.hook, question.argument, question.cause) == ("__supervise__", failure, failure)
    assert world.reports == [failure]
    assert world.local.started() == []
    question.answer(False)
    question.answer(True)
    assert world.local.started() == [[f"{MESH}.1~1"]]
    assert world.local.named("abandon") == []


def test_a_handled_loss_leaves_a_hole_and_nobody_starts_what_would_follow(world: World) -> None:
    owner = world.own(Restart())
    failure = world.die(f"{MESH}.1")

    owner.questions[0].answer(True)

    assert world.state(1) is RankState.HOLE
    assert world.local.named("abandon") == [{"proc": f"{MESH}.1~1"}]
    assert world.local.gone[f"{MESH}.1~1"] == replace(failure, restarts=False)
    assert world.escalated() == []
    assert world.notes == ["its owner has handled it"]
    assert [change.state for change in world.changes] == ["lost", "given up"]


def test_without_a_policy_what_is_not_handled_goes_to_the_owners_owner(world: World) -> None:
    owner = world.own(None)
    failure = world.die(f"{MESH}.1")

    owner.questions[0].answer(False)

    assert world.escalated() == [("controller.0", "root", failure)]
    assert world.state(1) is RankState.HOLE
    assert world.local.requests == []


def test_an_owner_that_defines_nothing_is_not_asked(world: World) -> None:
    owner = world.own(Restart(), owner=FakeRunner(supervises=False))

    world.die(f"{MESH}.1")

    assert owner.questions == []
    assert world.local.started() == [[f"{MESH}.1~1"]]


def test_an_owner_that_has_ended_is_not_asked(world: World) -> None:
    world.own(None)
    world.local.actors.clear()

    failure = world.die(f"{MESH}.1")

    assert world.escalated() == [("controller.0", "root", failure)]


def test_an_owner_that_raises_leaves_the_rest_to_its_own_failure(world: World) -> None:
    owner = world.own(Restart())
    world.die(f"{MESH}.1")

    owner.questions[0].answer(None)
    world.local.advance(2 * SUPERVISE_S)

    assert (world.local.started(), world.escalated(), world.local.named("abandon")) == ([], [], [])


def test_an_owner_that_is_late_has_not_handled_it(world: World) -> None:
    owner = world.own(Restart())
    world.die(f"{MESH}.1")
    world.local.advance(SUPERVISE_S - 0.1)
    assert world.local.started() == []

    world.local.advance(0.2)
    assert world.local.started() == [[f"{MESH}.1~1"]]

    owner.questions[0].answer(True)
    assert world.state(1) is RankState.STARTING
    assert world.local.named("abandon") == []


def test_an_owner_that_waits_for_the_lost_rank_cannot_answer(world: World) -> None:
    owner = world.own(Restart())
    world.local.blocked.append((OWNER, f"{MESH}.0"))
    world.die(f"{MESH}.1")
    world.local.advance(LOOK_S)
    assert world.local.started() == []

    world.local.blocked.append((OWNER, f"{MESH}.1"))
    world.local.advance(LOOK_S)

    assert world.local.started() == [[f"{MESH}.1~1"]]
    owner.questions[0].answer(True)
    world.local.advance(SUPERVISE_S)
    assert world.state(1) is RankState.STARTING


def test_two_losses_are_two_questions_and_each_has_its_own_answer(world: World) -> None:
    owner = world.own(Restart())
    world.die(f"{MESH}.0")
    world.die(f"{MESH}.2")

    owner.questions[1].answer(True)
    owner.questions[0].answer(False)

    assert [world.state(rank) for rank in range(3)] == [RankState.STARTING, RankState.UP, RankState.HOLE]


# up the tree


def test_what_the_owners_owner_handles_goes_no_further(world: World) -> None:
    world.own(None)
    world.local.actors["up-1"] = upper = FakeRunner()
    failure = MeshFailure(kind=FailureKind.KILLED, mesh="deep", rank=0, host="h")

    world.local.on_event["escalated"]({"to": "up-1", "failure": pack_failure(failure)})
    [question] = upper.questions
    question.answer(True)

    assert question.argument == failure
    assert world.escalated() == []
    assert world.notes == ["up-1 has handled it"]


def test_what_the_owners_owner_does_not_handle_goes_on_to_its_creator(world: World) -> None:
    world.local.actors["up-1"] = FakeRunner(supervises=False, creator="other-3.0~2/top-7")
    failure = MeshFailure(kind=FailureKind.KILLED, mesh="deep", rank=0, host="h")

    world.local.on_event["escalated"]({"to": "up-1", "failure": pack_failure(failure)})

    assert world.escalated() == [("other-3.0~2", "top-7", failure)]


def test_at_the_root_the_script_gets_a_moment_to_hear_of_it_by_itself(world: World) -> None:
    unhandled: list[MeshFailure] = []
    world.supervisor.at_root = unhandled.append
    world.own(None, owner=FakeRunner(supervises=False, creator=None))

    failure = world.die(f"{MESH}.1")

    assert unhandled == []
    world.local.advance(TOLD_S)
    assert unhandled == [failure]
    world.local.advance(100)
    assert unhandled == [failure]


def test_what_a_call_of_the_script_was_told_does_not_reach_the_hook(world: World) -> None:
    unhandled: list[MeshFailure] = []
    world.supervisor.at_root = unhandled.append
    world.own(None, owner=FakeRunner(supervises=False, creator=None))
    failure = world.die(f"{MESH}.1")
    world.supervisor.on_told(failure)
    other = world.die(f"{MESH}.2")

    world.local.advance(TOLD_S)

    assert unhandled == [other]


def test_to_be_told_of_the_root_of_a_chain_is_enough(world: World) -> None:
    unhandled: list[MeshFailure] = []
    world.supervisor.at_root = unhandled.append
    root = MeshFailure(kind=FailureKind.KILLED, mesh="deep", rank=0, host="h", pid=7)
    chained = MeshFailure(kind=FailureKind.ACTOR_ERROR, mesh="boss", rank=0, host="h", pid=8, cause=root)
    world.supervisor.on_told(root)

    world.local.on_event["escalated"]({"to": "nobody", "failure": pack_failure(chained)})
    world.local.advance(TOLD_S)

    assert unhandled == []


# policies


def test_a_restart_is_announced_started_and_reported_as_repaired(world: World) -> None:
    world.own(Restart(), owner=FakeRunner(supervises=False))
    world.die(f"{MESH}.1")
    world.supervisor.on_up(f"{MESH}.1~1")

    assert world.local.resolve(f"{MESH}.1") == f"{MESH}.1~1"
    [order] = world.local.named("spawn")
    assert (order["procs"], order["spares"], order["mesh"]) == ([f"{MESH}.1~1"], 0, MESH)
    assert order["boot_file"] != "old"
    assert world.repairs == [(1, 1)]
    assert [(change.state, change.incarnation) for change in world.changes] == [("lost", 0), ("up", 1)]
    assert world.state(1) is RankState.UP


def test_a_back_off_is_waited_for(world: World) -> None:
    world.own(Restart(backoff_s=2.0), owner=FakeRunner(supervises=False))
    world.die(f"{MESH}.1")
    assert world.local.started() == []

    world.local.advance(1.9)
    assert world.local.started() == []
    world.local.advance(0.2)
    assert world.local.started() == [[f"{MESH}.1~1"]]


def test_with_scope_mesh_the_others_are_ended_and_all_start_together(world: World) -> None:
    world.own(Restart(scope="mesh"), owner=FakeRunner(supervises=False))
    failure = world.die(f"{MESH}.1")

    stops = world.local.named("restart")
    assert [stop["proc"] for stop in stops] == [f"{MESH}.0", f"{MESH}.2"]
    why = unpack_failure(stops[0]["failure"])
    assert (why.kind, why.rank, why.cause) == (FailureKind.RESTARTED, 0, failure)
    world.die(f"{MESH}.0", FailureKind.RESTARTED)
    assert world.local.started() == []
    world.die(f"{MESH}.2", FailureKind.RESTARTED)

    assert world.local.started() == [[f"{MESH}.0~1", f"{MESH}.1~1", f"{MESH}.2~1"]]
    assert world.reports == [failure]


def test_with_scope_rest_lower_ranks_stay(world: World) -> None:
    world.own(Restart(scope="rest"), owner=FakeRunner(supervises=False))
    world.die(f"{MESH}.1")
    world.die(f"{MESH}.2", FailureKind.RESTARTED)

    assert world.local.started() == [[f"{MESH}.1~1", f"{MESH}.2~1"]]
    assert world.state(0) is RankState.UP


def test_past_the_limit_the_next_is_abandoned_and_the_failure_goes_up_with_the_reason(world: World) -> None:
    world.own(Restart(max_restarts=1), owner=FakeRunner(supervises=False))
    world.die(f"{MESH}.1")
    world.supervisor.on_up(f"{MESH}.1~1")

    world.die(f"{MESH}.1~1")

    assert world.local.named("abandon") == [{"proc": f"{MESH}.1~2"}]
    assert world.local.gone[f"{MESH}.1~2"].restarts is False
    [(_, _, failure)] = world.escalated()
    assert (failure.rank, failure.incarnation) == (1, 1)
    assert "1 restart" in failure.detail
    assert world.changes[-1].state == "given up"


def test_a_rank_given_up_while_it_started_has_no_successor(world: World) -> None:
    world.own(Restart(scope="mesh", max_restarts=1), owner=FakeRunner(supervises=False), count=2)
    world.die(f"{MESH}.0")
    world.die(f"{MESH}.1", FailureKind.RESTARTED)
    world.supervisor.on_up(f"{MESH}.1~1")

    # The limit is reached while rank 0 still starts.
    world.die(f"{MESH}.1~1")
    assert world.local.named("restart")[-1]["proc"] == f"{MESH}.0~1"
    world.die(f"{MESH}.0~1", FailureKind.RESTARTED)

    assert {each["proc"] for each in world.local.named("abandon")} == {f"{MESH}.1~2", f"{MESH}.0~2"}
    assert [world.state(rank) for rank in range(2)] == [RankState.HOLE, RankState.HOLE]


def test_the_end_of_an_older_incarnation_changes_nothing(world: World) -> None:
    world.own(Restart(), owner=FakeRunner(supervises=False))
    world.die(f"{MESH}.1")
    world.supervisor.on_up(f"{MESH}.1~1")
    before = list(world.local.requests)

    world.supervisor.on_proc_died(f"{MESH}.1", world.local.gone[f"{MESH}.1"], f"{MESH}.1~1")

    assert world.local.requests == before
    assert world.state(1) is RankState.UP


@pytest.mark.parametrize("proc", ["other-1.0", f"{MESH}.9"])
def test_a_process_that_is_not_owned_is_no_affair_of_ours(world: World, proc: str) -> None:
    world.own(Restart())

    world.die(proc)

    assert (world.local.requests, world.reports, world.changes) == ([], [], [])


def test_a_preempted_rank_moves_or_its_mesh_goes_on_without_it(world: World) -> None:
    world.own(Restart(preempted="shrink"), owner=FakeRunner(supervises=False))
    world.die(f"{MESH}.1", FailureKind.PREEMPTED)
    assert world.local.named("abandon") == [{"proc": f"{MESH}.1~1"}]
    assert world.escalated() == []

    world.own(Restart(preempted="move"), owner=FakeRunner(supervises=False))
    world.die(f"{MESH}.2", FailureKind.PREEMPTED)
    assert world.local.started() == [[f"{MESH}.2~1"]]


# by hand


def test_a_hole_is_filled_by_the_next_incarnation(world: World) -> None:
    owner = world.own(None)
    world.die(f"{MESH}.1")
    owner.questions[0].answer(False)

    world.supervisor.fill(MESH, [1], force=False)

    assert world.local.started() == [[f"{MESH}.1~1"]]
    assert world.local.resolve(f"{MESH}.1") == f"{MESH}.1~1"


def test_the_number_of_an_abandoned_incarnation_is_not_used_again(world: World) -> None:
    owner = world.own(Restart())
    world.die(f"{MESH}.1")
    owner.questions[0].answer(True)

    world.supervisor.fill(MESH, [1], force=False)

    assert world.local.started() == [[f"{MESH}.1~2"]]
    world.supervisor.on_up(f"{MESH}.1~2")
    assert world.state(1) is RankState.UP
    world.die(f"{MESH}.1~2")
    owner.questions[-1].answer(False)
    assert world.local.started()[-1] == [f"{MESH}.1~3"]


def test_an_incarnation_whose_host_was_lost_before_it_started_is_skipped(world: World) -> None:
    world.own(Restart(backoff_s=2.0), owner=FakeRunner(supervises=False))
    world.die(f"{MESH}.1")
    world.die(f"{MESH}.1~1", FailureKind.HOST_LOST)

    world.local.advance(2.1)

    assert world.local.started() == [[f"{MESH}.1~2"]]


@pytest.mark.parametrize("policy", [None, Restart()])
def test_a_rank_may_be_replaced_while_its_owner_is_asked(world: World, policy: Restart | None) -> None:
    owner = world.own(policy)
    world.die(f"{MESH}.1")

    world.supervisor.fill(MESH, [1], force=False)
    owner.questions[0].answer(True)

    assert world.local.started() == [[f"{MESH}.1~1"]]
    assert world.local.named("abandon") == []
    assert world.state(1) is RankState.STARTING


def test_a_rank_that_is_up_is_replaced_by_force(world: World) -> None:
    world.own(None)
    with pytest.raises(ValueError, match="is up"):
        world.supervisor.fill(MESH, [1], force=False)

    world.supervisor.fill(MESH, [1], force=True)
    assert [stop["proc"] for stop in world.local.named("restart")] == [f"{MESH}.1"]
    world.die(f"{MESH}.1", FailureKind.RESTARTED)

    assert world.local.started() == [[f"{MESH}.1~1"]]


# released


def test_a_mesh_that_was_stopped_is_forgotten_with_its_actors(world: World) -> None:
    world.own(Restart(), owner=FakeRunner(supervises=False))
    world.own_actors()

    world.supervisor.release_procs(MESH, [0, 1, 2])

    assert (world.supervisor.procs, world.supervisor.actors) == ({}, {})
    assert world.local.named("stop_mesh") == [{"mesh": MESH}]
    assert world.local.taken_back == [KEEPER]
    world.die(f"{MESH}.1")
    assert world.local.started() == []


def test_of_a_mesh_that_was_stopped_in_part_the_rest_lives_on(world: World) -> None:
    world.own(Restart(), owner=FakeRunner(supervises=False))
    world.supervisor.release_procs(MESH, [0])
    world.die(f"{MESH}.0", FailureKind.STOPPED)

    world.die(f"{MESH}.1")

    assert world.local.started() == [[f"{MESH}.1~1"]]
    assert world.local.named("stop_mesh") == []
    world.supervisor.release_procs(MESH, [1, 2])
    assert world.local.named("stop_mesh") == [{"mesh": MESH}]


def test_who_waited_for_a_rank_that_is_stopped_starts_without_it(world: World) -> None:
    world.own(Restart(scope="mesh"), owner=FakeRunner(supervises=False))
    world.die(f"{MESH}.1")
    world.die(f"{MESH}.2", FailureKind.RESTARTED)

    world.supervisor.release_procs(MESH, [0])

    assert world.local.started() == [[f"{MESH}.1~1", f"{MESH}.2~1"]]


def test_an_answer_that_comes_after_the_stop_starts_nothing(world: World) -> None:
    owner = world.own(Restart())
    world.die(f"{MESH}.1")
    world.supervisor.release_procs(MESH, [0, 1, 2])

    owner.questions[0].answer(False)

    assert world.local.started() == []


def test_a_back_off_that_ends_after_the_stop_starts_nothing(world: World) -> None:
    world.own(Restart(backoff_s=2.0), owner=FakeRunner(supervises=False))
    world.die(f"{MESH}.1")
    world.supervisor.release_procs(MESH, [0, 1, 2])

    world.local.advance(10)

    assert world.local.started() == []


def test_actors_that_were_stopped_are_not_made_again(world: World) -> None:
    world.own(Restart(), owner=FakeRunner(supervises=False))
    actors = world.own_actors()
    world.own_actors(key="b-1")

    world.supervisor.release_actors(actors)
    world.die(f"{MESH}.1")

    assert [envelope[1] for _, envelope in world.local.sent if envelope[0] == wire.SPAWN] == ["b-1"]
    assert world.local.taken_back == [KEEPER]


# actors


def test_actors_of_a_process_are_sent_to_the_next_before_anything_else(world: World) -> None:
    world.own(Restart(), owner=FakeRunner(supervises=False))
    world.own_actors()

    world.die(f"{MESH}.1")

    assert world.local.made() == [(f"{MESH}.1~1", 0)]
    assert world.local.lent == [f"{MESH}.1~1"]
    assert world.local.resolve(f"{MESH}.1") == f"{MESH}.1~1"


def test_a_failed_actor_is_asked_about_and_made_again_where_it_was(world: World) -> None:
    owner = world.own(Restart())
    world.own_actors()

    failure = world.fail_actor(f"{MESH}.1")
    owner.questions[0].answer(False)

    assert owner.questions[0].argument == failure
    assert world.local.made() == [(f"{MESH}.1", 1)]
    assert (world.reports, world.repairs) == ([failure], [(1, 1)])
    assert world.local.started() == []


def test_a_failed_actor_that_its_owner_handles_is_abandoned(world: World) -> None:
    owner = world.own(Restart())
    world.own_actors()
    world.fail_actor(f"{MESH}.1")

    owner.questions[0].answer(True)

    assert world.local.made() == []
    assert world.local.events("actor_abandoned") == [(f"{MESH}.1", {"actor": ACTORS})]
    assert world.escalated() == []


def test_a_failed_actor_without_a_policy_is_abandoned_and_goes_up(world: World) -> None:
    world.own(None, owner=FakeRunner(supervises=False))
    world.own_actors()

    failure = world.fail_actor(f"{MESH}.1")

    assert world.local.events("actor_abandoned") == [(f"{MESH}.1", {"actor": ACTORS})]
    assert world.escalated() == [("controller.0", "root", failure)]


def test_an_actors_limit_is_its_own(world: World) -> None:
    world.own(Restart(max_restarts=1), owner=FakeRunner(supervises=False))
    world.own_actors()
    world.fail_actor(f"{MESH}.1")

    failure = world.fail_actor(f"{MESH}.1", times=1)

    assert world.local.made() == [(f"{MESH}.1", 1)]
    assert [each[2].incarnation for each in world.escalated()] == [failure.incarnation]
    world.die(f"{MESH}.2")
    assert world.local.started() == [[f"{MESH}.2~1"]]


def test_an_actor_that_was_given_up_comes_back_with_its_process_and_counts_again(world: World) -> None:
    world.own(Restart(max_restarts=1), owner=FakeRunner(supervises=False))
    world.own_actors()
    world.fail_actor(f"{MESH}.1")
    world.fail_actor(f"{MESH}.1", times=1)
    world.die(f"{MESH}.1")
    [_, (proc, times)] = world.local.made()
    assert proc == f"{MESH}.1~1"

    world.fail_actor(f"{MESH}.1~1", times=times)

    assert len(world.escalated()) == 2


def test_an_actor_that_waits_for_its_turn_is_made_once_if_its_process_dies_meanwhile(world: World) -> None:
    world.own(None, owner=FakeRunner(supervises=False))
    world.own_actors(Restart(backoff_s=2.0))
    world.fail_actor(f"{MESH}.1")
    world.die(f"{MESH}.1", following=True)
    assert [proc for proc, _ in world.local.made()] == [f"{MESH}.1~1"]

    world.local.advance(10)

    assert [proc for proc, _ in world.local.made()] == [f"{MESH}.1~1"]


def test_with_scope_mesh_all_actors_are_made_again(world: World) -> None:
    world.own(None, owner=FakeRunner(supervises=False))
    world.own_actors(Restart(scope="mesh"))

    world.fail_actor(f"{MESH}.1")

    assert sorted(world.local.made()) == [(f"{MESH}.{rank}", 1) for rank in range(3)]


def test_the_failure_of_an_actor_that_was_to_be_made_again_anyhow_does_not_count(world: World) -> None:
    world.own(None, owner=FakeRunner(supervises=False))
    world.own_actors(Restart(scope="mesh", max_restarts=1))
    world.fail_actor(f"{MESH}.1")

    # It had failed as well, before it heard of the first.
    world.fail_actor(f"{MESH}.2")

    assert len(world.local.made()) == 3
    assert world.escalated() == []


def test_a_dead_process_makes_the_actors_of_its_scope_again_with_numbers_of_their_own(world: World) -> None:
    world.own(None, owner=FakeRunner(supervises=False))
    world.own_actors(Restart(scope="mesh"))
    owned = world.supervisor.procs[MESH]
    owned.policy = owned.tracker.policy = Restart()

    world.die(f"{MESH}.1")
    assert sorted(world.local.made()) == [(f"{MESH}.0", 1), (f"{MESH}.1~1", 0), (f"{MESH}.2", 1)]

    world.fail_actor(f"{MESH}.0", times=1)
    assert (f"{MESH}.0", 2) in world.local.made()


def test_a_policy_of_actors_serves_processes_that_had_none(world: World) -> None:
    world.own(None, owner=FakeRunner(supervises=False))
    world.own_actors(Restart())

    world.die(f"{MESH}.1")

    assert world.local.named("policy") == [{"mesh": MESH, "restartable": True}]
    assert world.local.started() == [[f"{MESH}.1~1"]]
    assert world.supervisor.is_restartable(SimpleNamespace(_key=ACTORS))  # type: ignore[arg-type]


def test_an_actor_that_failed_in_a_process_that_is_gone_is_not_looked_at(world: World) -> None:
    owner = world.own(Restart())
    world.own_actors()
    world.die(f"{MESH}.1")
    num_questions = len(owner.questions)

    world.fail_actor(f"{MESH}.1")

    assert len(owner.questions) == num_questions


def test_actors_on_the_processes_of_another_are_asked_about_but_not_mended(world: World) -> None:
    world.local.actors[OWNER] = owner = FakeRunner()
    world.own_actors(mesh="other-1")

    failure = world.die("other-1.1")

    [question] = owner.questions
    assert (question.argument.mesh, question.argument.cause) == ("a", failure)
    question.answer(False)
    assert (world.local.requests, world.escalated()) == ([], [])


def test_where_an_actor_has_written_its_state_is_told_to_the_next(world: World) -> None:
    world.own(Restart(), owner=FakeRunner(supervises=False))
    world.own_actors()
    world.local.on_event["kept_on_disk"]({"actor": ACTORS, "proc": f"{MESH}.1", "file": "/kept"})

    world.die(f"{MESH}.1")
    world.die(f"{MESH}.2")

    files = {proc: each[3][2] for proc, each in world.local.sent if each[0] == wire.SPAWN}
    assert files == {f"{MESH}.1~1": "/kept", f"{MESH}.2~1": None}


def test_an_actor_here_that_is_not_made_again_is_told(world: World) -> None:
    world.local.actors["x-1"] = runner = FakeRunner()

    world.local.on_event["actor_abandoned"]({"actor": "x-1"})
    world.local.on_event["actor_abandoned"]({"actor": "unknown"})

    assert runner.abandoned == 1


# stuck


@pytest.mark.parametrize(("policy", "is_ended"), [(None, False), (Restart(), False), (Restart(stuck=True), True)])
def test_a_stuck_process_is_ended_only_where_its_policy_says_so(
    world: World, policy: Restart | None, is_ended: bool
) -> None:
    owner = world.own(policy)
    failure = MeshFailure(kind=FailureKind.STUCK, mesh="m", rank=1, host="h")

    world.local.on_event["stuck"]({"proc": f"{MESH}.1", "failure": pack_failure(failure)})
    owner.questions[0].answer(False)

    assert [stop["proc"] for stop in world.local.named("restart")] == [f"{MESH}.1"] * is_ended
    assert world.state(1) is RankState.UP


def test_the_owner_is_not_asked_twice_about_a_stuck_process(world: World) -> None:
    owner = world.own(Restart(stuck=True))
    failure = MeshFailure(kind=FailureKind.STUCK, mesh="m", rank=1, host="h")
    world.local.on_event["stuck"]({"proc": f"{MESH}.1", "failure": pack_failure(failure)})
    owner.questions[0].answer(False)

    world.die(f"{MESH}.1", FailureKind.STUCK)

    assert len(owner.questions) == 1
    assert world.local.started() == [[f"{MESH}.1~1"]]


def test_a_process_that_answers_again_is_noted(world: World) -> None:
    world.own(Restart())
    failure = MeshFailure(kind=FailureKind.STUCK, mesh="m", rank=1, host="h")

    world.local.on_event["recovered"]({"proc": f"{MESH}.1", "failure": pack_failure(failure)})

    assert world.notes == ["it answers again"]
