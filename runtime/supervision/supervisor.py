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

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..address import address, incarnation_of, mesh_of, rank_of, slots_of
from ..failure import FailureKind, MeshFailure, pack_failure, unpack_failure
from ..host.boot import write_boot_file
from .actor_supervisor import ActorSupervisor
from .owned import Change, OwnedActors, OwnedProcs
from .restart import Command, GiveUp, RankState, RestartTracker, StartRank, StopRank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..proc import LocalProc
    from .restart import Restart


class Supervisor(ActorSupervisor):
    """Meshes that this process owns, and what becomes of them."""

    def __init__(self, local: LocalProc) -> None:
        super().__init__(local)
        self._asked: set[str] = set()
        local.on_event |= {
            "stuck": lambda fields: self._on_stuck(fields["proc"], unpack_failure(fields["failure"])),
            "recovered": lambda fields: self._on_recovered(fields["proc"], unpack_failure(fields["failure"])),
            "preempted": self._on_preempted,
        }

    # what is owned (any thread):

    def own_procs(self, order: dict[str, Any], boot: bytes, owner: str, policy: Restart | None) -> None:
        """Look after a proc mesh that is about to be ordered."""
        self.procs[order["mesh"]] = OwnedProcs(order, boot, owner, RestartTracker(policy, order["count"]), policy)

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
            is_here = self._local.slot in slots_of(owned.mesh)
            boot_file = write_boot_file(self._local, owned.mesh, owned.boot) if is_here else ""
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
