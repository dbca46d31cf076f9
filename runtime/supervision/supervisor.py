"""A process's part in the supervision tree: hears of losses in the meshes it owns, asks, carries out policies.

    loss --> owner's __supervise__ --truthy--> handled: the rank stays a hole
                 | falsy, absent, late      raising: the owner fails with it, and its owner hears of that
                 v
             policy --restart--> the agent starts the next incarnation, the spawner sends its actors again
                 | none, or past its limit
                 v
             owner's owner's __supervise__ ... --> controller: unhandled_fault_hook

All of this runs on the I/O thread, except `__supervise__`, which runs on its actor's thread. What a caller is told does
not wait for any of it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..address import address, incarnation_of, mesh_of, place_of, rank_of
from ..failure import FailureKind, MeshFailure, pack_failure, unpack_failure
from ..host.boot import write_boot_file
from ..messages import wire
from .asking import Asking
from .restart import Command, GiveUp, RankState, RestartTracker, StartRank, StopRank

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..actor_mesh import ActorMesh
    from ..messages.attachment import Outgoing
    from ..proc import LocalProc
    from ..shapes.shape import Region
    from .elastic import Filling
    from .restart import Restart

TOLD_S: Final = 0.25
"""How long the script has to hear of a failure by a call of its own before the hook is called."""

KEEPER: Final = "@spawner"
"""Holder of the arguments of actors that may have to be made again."""

_log = logging.getLogger("danaus")


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to one rank of a mesh; see ``ProcMesh.on_change``.

    Attributes:
        rank: Base rank in the mesh.
        incarnation: Of the process that this is about.
        state: ``"lost"``, ``"up"`` (again), ``"given up"``, or ``"preempted"``: its host is about to be taken away.
        failure: How it was lost, where it is.
    """

    rank: int
    incarnation: int
    state: str
    failure: MeshFailure | None = None


@dataclass(slots=True)
class OwnedProcs:
    """A proc mesh that this process ordered."""

    order: dict[str, Any]
    boot: bytes
    """What its processes read when they start."""
    owner: str
    tracker: RestartTracker
    policy: Restart | None
    lost: dict[int, MeshFailure] = field(default_factory=dict)
    callbacks: list[Callable[[Change], object]] = field(default_factory=list)
    fillings: list[Filling] = field(default_factory=list)

    @property
    def mesh(self) -> str:
        """Id of the mesh."""
        return self.order["mesh"]

    def place(self, rank: int) -> str:
        """Place of a rank."""
        return f"{self.mesh}.{rank}"


@dataclass(slots=True)
class OwnedActors:
    """An actor mesh that this process spawned, and what makes its actors again."""

    mesh: ActorMesh
    owner: str
    out: Outgoing
    tracker: RestartTracker
    policy: Restart | None
    lost: dict[int, MeshFailure] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """Where actors have written what they want to have back, by place."""

    @property
    def region(self) -> Region:
        """Its ranks, as ranks of the proc mesh."""
        return self.mesh._region


class Supervisor:
    """Meshes that this process owns, and what becomes of them."""

    def __init__(self, local: LocalProc) -> None:
        self._local = local
        self.procs: dict[str, OwnedProcs] = {}
        self.actors: dict[str, OwnedActors] = {}
        self.at_root: Callable[[MeshFailure], None] | None = None
        """Set in the controller: what to do with a failure that nobody has handled."""
        self.report: Callable[[MeshFailure], None] = lambda failure: _log.error("%s", failure.report())
        self.note: Callable[[MeshFailure, str], None] = lambda failure, text: _log.warning("%s: %s", failure.who, text)
        self.repaired: Callable[[MeshFailure, int], None] = lambda failure, incarnation: _log.warning(
            "%s: started again as incarnation %d", failure.who, incarnation
        )
        self._told: set[tuple[Any, ...]] = set()
        self._asked: set[str] = set()
        self._stopped: dict[str, list[str]] = {}
        """Actors that were stopped, by the proc mesh that they were on."""
        local.on_event |= {
            "actor_failed": self._on_actor_failed,
            "escalated": lambda fields: self._ask(
                fields["to"], unpack_failure(fields["failure"]), partial(self._after_owners_owner, fields["to"])
            ),
            "stuck": lambda fields: self._on_stuck(fields["proc"], unpack_failure(fields["failure"])),
            "recovered": lambda fields: self._on_recovered(fields["proc"], unpack_failure(fields["failure"])),
            "preempted": self._on_preempted,
            "kept_on_disk": self._on_kept_on_disk,
            "actors_stopped": self._on_actors_stopped,
            "actor_abandoned": lambda fields: self._on_abandoned(fields["actor"]),
        }

    # what is owned (any thread):

    def own_procs(self, order: dict[str, Any], boot: bytes, owner: str, policy: Restart | None) -> None:
        """Look after a proc mesh that is about to be ordered."""
        self.procs[order["mesh"]] = OwnedProcs(order, boot, owner, RestartTracker(policy, order["count"]), policy)

    def own_actors(self, mesh: ActorMesh, owner: str, out: Outgoing, policy: Restart | None) -> None:
        """Look after an actor mesh that is about to be spawned; without a policy it has that of its proc mesh."""
        procs = self.procs.get(mesh._procs._mesh_id)
        if procs is not None and policy is not None and procs.policy is None:
            procs.policy = procs.tracker.policy = policy
            procs.order["restartable"] = True
            self._local.request("policy", {"mesh": procs.mesh, "restartable": True})
        chosen = policy or (procs.policy if procs is not None else None)
        tracker = RestartTracker(chosen, mesh._region.nelements)
        self.actors[mesh._key] = OwnedActors(mesh, owner, out, tracker, chosen)

    def is_restartable(self, mesh: ActorMesh) -> bool:
        """Whether a failed actor of ``mesh`` may be made again."""
        owned = self.actors.get(mesh._key)
        return owned is not None and owned.policy is not None

    def release_procs(self, mesh_id: str, ranks: list[int]) -> None:
        """The owner stops these ranks."""
        owned = self.procs.get(mesh_id)
        if owned is None:
            return

        def release() -> None:
            for rank in ranks:
                owned.tracker.on_released(rank)
            if all(owned.tracker.state(rank) is RankState.RELEASED for rank in range(owned.order["count"])):
                self.procs.pop(mesh_id, None)
                self._stopped.pop(mesh_id, None)
                for key in [key for key, actors in list(self.actors.items()) if actors.mesh._procs._mesh_id == mesh_id]:
                    self._forget_actors(key)
                self._local.request("stop_mesh", {"mesh": mesh_id})
            else:
                # Others may have waited for these to end.
                self._check(owned, None)

        self._local.run_soon(release)

    def release_actors(self, mesh: ActorMesh) -> None:
        """The owner stops these actors."""

        def release() -> None:
            owned = self.actors.get(mesh._key)
            if owned is None:
                return
            for rank in mesh._region.ranks():
                owned.tracker.on_released(owned.region.index_of(rank))
            if all(owned.tracker.state(index) is RankState.RELEASED for index in range(owned.region.nelements)):
                self._forget_actors(mesh._key)
                self._stopped.setdefault(mesh._procs._mesh_id, []).append(mesh._key)

        self._local.run_soon(release)

    def _forget_actors(self, key: str) -> None:
        owned = self.actors.pop(key, None)
        if owned is not None:
            self._local.attachments.take_back(owned.out, KEEPER)

    def fill(self, mesh_id: str, ranks: list[int], *, force: bool) -> None:
        """Start ranks again by hand (I/O thread).

        Raises:
            ValueError: A rank is up and ``force`` is not set.
        """
        owned = self.procs[mesh_id]
        commands: list[Command] = []
        for rank in ranks:
            if rank in owned.lost and owned.tracker.state(rank) is RankState.UP:
                # Its owner is being asked about it, and this is the answer.
                owned.tracker.on_failed(rank, time.monotonic(), may_restart=False)
            commands += owned.tracker.on_replace(rank, time.monotonic(), force=force)
        self._carry_out(owned, commands, None)

    # losses (I/O thread):

    def on_proc_died(self, proc: str, failure: MeshFailure, following: str | None) -> None:
        """A process that this one watches is gone."""
        for actors in list(self.actors.values()):
            self._on_home_lost(actors, proc, failure)
        owned = self.procs.get(mesh_of(proc))
        if owned is None or rank_of(proc) >= owned.order["count"]:
            return
        rank = rank_of(proc)
        if incarnation_of(proc) != owned.tracker.incarnation(rank) or failure.kind is FailureKind.STOPPED:
            return
        owned.lost[rank] = failure
        self._tell_change(owned, Change(rank, incarnation_of(proc), "lost", failure))
        if owned.tracker.state(rank) in {RankState.STOPPING, RankState.HOLE}:
            self._carry_out(owned, owned.tracker.on_ended(rank, time.monotonic()), failure)
            if owned.tracker.state(rank) is RankState.HOLE:
                self._abandon(following, failure)
            return
        self.report(failure)
        if proc in self._asked:
            # Its owner was asked when it was found stuck.
            self._asked.discard(proc)
            self._after_owner(owned, proc, following, failure, False)
        else:
            self._ask(owned.owner, failure, partial(self._after_owner, owned, proc, following), lost=proc)

    def _on_home_lost(self, actors: OwnedActors, proc: str, failure: MeshFailure) -> None:
        """A process of another owner took an actor of ours with it: ours to know, that owner's to mend."""
        mesh_id = actors.mesh._procs._mesh_id
        is_ours = mesh_id in self.procs or mesh_of(proc) != mesh_id or rank_of(proc) not in actors.region
        if is_ours or failure.kind is FailureKind.RESTARTED:
            return
        if failure.kind is FailureKind.STOPPED:
            tracker = actors.tracker
            tracker.on_released(actors.region.index_of(rank_of(proc)))
            if all(tracker.state(index) is RankState.RELEASED for index in range(tracker.num_ranks)):
                self._forget_actors(actors.mesh._key)
            return
        lost = replace(failure, mesh=actors.mesh.name, cause=failure, log_tail=(), traceback="", detail="")
        self._ask(actors.owner, lost, lambda _failure, _handled: None)

    def _after_owner(
        self, owned: OwnedProcs, proc: str, following: str | None, failure: MeshFailure, handled: bool
    ) -> None:
        rank = rank_of(proc)
        if self.procs.get(owned.mesh) is not owned or owned.tracker.incarnation(rank) != incarnation_of(proc):
            return
        shrinks = owned.policy is not None and owned.policy.preempted == "shrink"
        goes_on = shrinks and failure.kind is FailureKind.PREEMPTED
        may_restart = following is not None and not handled and not goes_on
        commands = owned.tracker.on_failed(rank, time.monotonic(), may_restart=may_restart)
        if handled or goes_on:
            self.note(failure, "its owner has handled it" if handled else "its mesh goes on without it, by its policy")
            commands = [command for command in commands if not isinstance(command, GiveUp)]
            self._abandon(following, failure)
            self._tell_change(owned, Change(rank, incarnation_of(proc), "given up", failure))
        self._carry_out(owned, commands, failure)

    def _abandon(self, following: str | None, failure: MeshFailure | None) -> None:
        """Nobody starts ``following``; what waits for it here fails now."""
        if following is None or following in self._local.gone:
            return
        self._local.request("abandon", {"proc": following})
        if failure is not None:
            self._local.mark_gone(following, replace(failure, restarts=False))

    def _carry_out(self, owned: OwnedProcs, commands: Sequence[Command], failure: MeshFailure | None) -> None:
        """Do what a proc mesh's tracker says."""
        starting: list[str] = []
        for command in commands:
            if isinstance(command, StartRank):
                starting.append(self._announce(owned, command))
            elif isinstance(command, StopRank):
                why = self._restarted(owned, command.rank, failure)
                current = self._local.resolve(owned.place(command.rank))
                self._local.request("restart", {"proc": current, "failure": pack_failure(why)})
            else:
                self._give_up(owned, command, failure)
        if starting:
            # The host agent may be another one by now, with a directory of its own.
            boot_file = write_boot_file(self._local, owned.mesh, owned.boot)
            self._local.request("spawn", {**owned.order, "procs": starting, "boot_file": boot_file})
        next_s = owned.tracker.next_check_s()
        if next_s is not None:
            self._local.run_at(next_s, lambda: self._check(owned, failure))

    def _check(self, owned: OwnedProcs, failure: MeshFailure | None) -> None:
        if self.procs.get(owned.mesh) is owned:
            self._carry_out(owned, owned.tracker.check(time.monotonic()), failure)

    def _announce(self, owned: OwnedProcs, command: StartRank) -> str:
        """Have everything here go to the new incarnation; its actors come first."""
        place = owned.place(command.rank)
        before = self._local.resolve(place)
        # One that was abandoned, or whose host was lost before it started, has had its number.
        unused = incarnation_of(before) + (before in self._local.gone)
        owned.tracker.skip_to(command.rank, unused)
        proc = address(place, max(command.incarnation, unused))
        if before != proc:
            with self._local.places_lock:
                self.spawn_again(before, proc)
                self._local.on_replaced(before, proc)
        return proc

    def _restarted(self, owned: OwnedProcs, rank: int, cause: MeshFailure | None) -> MeshFailure:
        return MeshFailure(
            kind=FailureKind.RESTARTED,
            mesh=owned.order["name"],
            rank=rank,
            host=self._local.host,
            incarnation=owned.tracker.incarnation(rank),
            cause=cause,
        )

    def _give_up(self, owned: OwnedProcs, command: GiveUp, failure: MeshFailure | None) -> None:
        rank = command.rank
        lost = failure if failure is not None and failure.rank == rank else owned.lost.get(rank, failure)
        current = self._local.resolve(owned.place(rank))
        if incarnation_of(current) > owned.tracker.incarnation(rank):
            self._abandon(current, lost)
        if lost is None:
            return
        if owned.policy is not None and command.num_restarts >= owned.policy.max_restarts:
            limit = f"given up after {command.num_restarts} restarts within {owned.policy.within_s:g} s"
            lost = replace(lost, detail=f"{lost.detail}\n{limit}".strip())
            self.note(lost, limit)
        self._tell_change(owned, Change(rank, owned.tracker.incarnation(rank), "given up", lost))
        self._escalate(owned.owner, lost)

    def on_up(self, proc: str) -> None:
        """A process takes messages."""
        owned = self.procs.get(mesh_of(proc))
        rank = rank_of(proc)
        if owned is None or rank >= owned.order["count"] or owned.tracker.state(rank) is not RankState.STARTING:
            return
        if incarnation_of(proc) == owned.tracker.incarnation(rank):
            owned.tracker.on_started(rank)
            lost = owned.lost.pop(rank, None)
            if lost is not None:
                self.repaired(lost, incarnation_of(proc))
            self._tell_change(owned, Change(rank, incarnation_of(proc), "up"))
            for filling in list(owned.fillings):
                filling.on_up(proc)

    def _tell_change(self, owned: OwnedProcs, change: Change) -> None:
        from ..calls.future import _run_apart

        for callback in list(owned.callbacks):
            _run_apart(partial(callback, change))

    # actors:

    def spawn_again(self, before: str, proc: str) -> None:
        """Put the actors that this process had spawned at a place into its new process, ahead of other messages."""
        place = place_of(before)
        stopped = list(self._stopped.get(mesh_of(place), ()))
        for owned in list(self.actors.values()):
            mesh_id, rank = owned.mesh._procs._mesh_id, rank_of(place)
            if mesh_id != mesh_of(place) or rank not in owned.region:
                continue
            index = owned.region.index_of(rank)
            state = owned.tracker.state(index)
            if state is RankState.RELEASED:
                stopped.append(owned.mesh._key)
                continue
            # One that had failed as well, and waits or was given up, comes back with its process.
            commands = [] if state is RankState.UP else owned.tracker.on_replace(index, time.monotonic())
            for command in commands:
                if isinstance(command, StartRank) and command.rank == index:
                    owned.tracker.on_started(index)
            others = [command for command in commands if command.rank != index]
            self._send_spawn(owned, proc, owned.tracker.incarnation(index), None)
            self._carry_out_actors(owned, [*others, *self._scope_commands(owned, index)], owned.lost.pop(index, None))

        if stopped:
            # Else what is sent to them would wait for them there.
            self._local.send(proc, [wire.EVENT, "actors_stopped", {"actors": stopped}])

    def _on_actors_stopped(self, fields: dict[str, Any]) -> None:
        from ..runner import make_tombstone

        for key in fields["actors"]:
            self._local.add_actor(key, make_tombstone(self._local, key, "stopped in an earlier incarnation"))

    def _scope_commands(self, owned: OwnedActors, lost: int) -> list[Command]:
        """An actor is made again with its process; others that its policy names are made again where they are."""
        policy = owned.policy
        if policy is None or policy.scope == "rank" or owned.mesh._procs._mesh_id in self._whole_restarts():
            return []
        first, now_s = 0 if policy.scope == "mesh" else lost + 1, time.monotonic()
        commands: list[Command] = []
        for index in range(first, owned.region.nelements):
            if index != lost and owned.tracker.state(index) is RankState.UP:
                commands += owned.tracker.on_replace(index, now_s, force=True)
        return commands

    def _whole_restarts(self) -> set[str]:
        """Meshes whose processes are restarted together anyhow."""
        owned_meshes = list(self.procs.items())
        return {mesh for mesh, owned in owned_meshes if owned.policy is not None and owned.policy.scope != "rank"}

    def _send_spawn(self, owned: OwnedActors, proc: str, incarnation: int, cause: MeshFailure | None) -> None:
        out = owned.out
        self._local.attachments.lend_again(out, proc)
        why = None if cause is None else pack_failure(cause)
        life = [incarnation, owned.policy is not None, owned.files.get(place_of(proc)), why]
        envelope = [wire.SPAWN, owned.mesh._key, self._local.proc_id, life, out.body, out.attachment]
        self._local.link(proc).send(wire.pack(envelope), out.frames)

    def _on_actor_failed(self, fields: dict[str, Any]) -> None:
        failure, proc = unpack_failure(fields["failure"]), fields["proc"]
        owned = self.actors.get(fields["actor"])
        if proc in self._local.gone:
            return
        self.report(failure)
        if owned is None:
            return
        index = owned.region.index_of(rank_of(proc))
        if failure.incarnation - incarnation_of(proc) != owned.tracker.incarnation(index):
            # It was to be made again anyhow.
            return
        owned.lost[index] = failure
        self._ask(owned.owner, failure, partial(self._after_actors_owner, owned, index, proc), lost=proc)

    def _after_actors_owner(
        self, owned: OwnedActors, index: int, proc: str, failure: MeshFailure, handled: bool
    ) -> None:
        if self.actors.get(owned.mesh._key) is not owned or proc in self._local.gone:
            return
        if failure.incarnation - incarnation_of(proc) != owned.tracker.incarnation(index):
            return
        commands = owned.tracker.on_failed(index, time.monotonic(), may_restart=not handled)
        if handled:
            self.note(failure, "its owner has handled it")
            self._local.send(proc, [wire.EVENT, "actor_abandoned", {"actor": owned.mesh._key}])
            return
        self._carry_out_actors(owned, commands, failure)

    def _carry_out_actors(self, owned: OwnedActors, commands: Sequence[Command], failure: MeshFailure | None) -> None:
        """Do what an actor mesh's tracker says. To stop an actor and to start it again is one message."""
        todo = list(commands)
        while todo:
            command = todo.pop(0)
            rank = owned.region.ranks()[command.rank]
            proc = self._local.resolve(f"{owned.mesh._procs._mesh_id}.{rank}")
            if isinstance(command, StopRank):
                todo += owned.tracker.on_ended(command.rank, time.monotonic())
            elif isinstance(command, StartRank):
                self._send_spawn(owned, proc, command.incarnation, failure)
                owned.tracker.on_started(command.rank)
                lost = owned.lost.pop(command.rank, None)
                if lost is not None:
                    self.repaired(lost, command.incarnation)
            else:
                self._local.send(proc, [wire.EVENT, "actor_abandoned", {"actor": owned.mesh._key}])
                lost = owned.lost.get(command.rank, failure)
                if lost is not None:
                    self._escalate(owned.owner, lost)
        next_s = owned.tracker.next_check_s()
        if next_s is not None:
            self._local.run_at(next_s, lambda: self._check_actors(owned, failure))

    def _check_actors(self, owned: OwnedActors, failure: MeshFailure | None) -> None:
        if self.actors.get(owned.mesh._key) is owned:
            self._carry_out_actors(owned, owned.tracker.check(time.monotonic()), failure)

    def _on_kept_on_disk(self, fields: dict[str, Any]) -> None:
        owned = self.actors.get(fields["actor"])
        if owned is not None:
            owned.files[place_of(fields["proc"])] = fields["file"]

    def _on_abandoned(self, key: str) -> None:
        runner = self._local.actors.get(key)
        if runner is not None:
            runner.on_abandoned()

    # stuck:

    def _on_stuck(self, proc: str, failure: MeshFailure) -> None:
        """A process lives and does not answer: an event, and by policy a reason to start it again."""
        self.report(failure)
        owned = self.procs.get(mesh_of(proc))
        if owned is not None and rank_of(proc) < owned.order["count"]:
            self._ask(owned.owner, failure, partial(self._after_stuck, owned, proc), lost=proc)

    def _after_stuck(self, owned: OwnedProcs, proc: str, failure: MeshFailure, handled: bool) -> None:
        if not handled and owned.policy is not None and owned.policy.stuck and proc not in self._local.gone:
            self._asked.add(proc)
            self._local.request("restart", {"proc": proc, "failure": pack_failure(failure)})

    def _on_preempted(self, fields: dict[str, Any]) -> None:
        """A host is about to be taken away; what its ranks do in the meantime is their own affair."""
        for proc in fields["procs"]:
            owned = self.procs.get(mesh_of(proc))
            if owned is not None:
                self._tell_change(owned, Change(rank_of(proc), incarnation_of(proc), "preempted"))

    def _on_recovered(self, proc: str, failure: MeshFailure) -> None:
        del proc
        self.note(failure, "it answers again")

    # up the tree:

    def _ask(
        self, owner: str, failure: MeshFailure, then: Callable[[MeshFailure, bool], None], *, lost: str = ""
    ) -> None:
        """Call the owner's ``__supervise__`` on its thread, then ``then(failure, handled)`` here."""
        Asking(self._local, owner, failure, then, lost).start()

    def _escalate(self, owner: str, failure: MeshFailure) -> None:
        """Hand ``failure`` to the owner of ``owner``."""
        runner = self._local.actors.get(owner)
        creator = runner.creator if runner is not None else None
        if creator is None and self.at_root is not None:
            self._local.run_at(time.monotonic() + TOLD_S, partial(self._at_root, failure))
            return
        proc, _, key = (creator or "controller.0/root").partition("/")
        self._local.send(proc, [wire.EVENT, "escalated", {"to": key, "failure": pack_failure(failure)}])

    def _after_owners_owner(self, key: str, failure: MeshFailure, handled: bool) -> None:
        if handled:
            self.note(failure, f"{key} has handled it")
        else:
            self._escalate(key, failure)

    def on_told(self, failure: MeshFailure) -> None:
        """A call of this process failed by ``failure``: whoever made it has been told (any thread)."""
        if self.at_root is not None:
            self._told.add(_identity(failure))

    def _at_root(self, failure: MeshFailure) -> None:
        is_told = any(_identity(each) in self._told for each in failure.chain())
        if not is_told and self.at_root is not None:
            self.at_root(failure)


def _identity(failure: MeshFailure) -> tuple[Any, ...]:
    return failure.mesh, failure.rank, failure.incarnation, failure.host, failure.pid
