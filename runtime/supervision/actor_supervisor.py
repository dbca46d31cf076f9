"""Actor meshes that a process has spawned: made again where they fail, and where their process is started again."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from ..address import incarnation_of, mesh_of, place_of, rank_of
from ..failure import pack_failure, unpack_failure
from ..messages import wire
from .owned import KEEPER, OwnedActors, OwnedProcs
from .restart import Command, RankState, RestartTracker, StartRank, StopRank
from .tree import Tree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..actor_mesh import ActorMesh
    from ..failure import MeshFailure
    from ..messages.attachment import Outgoing
    from ..proc import LocalProc
    from .restart import Restart


class ActorSupervisor(Tree):
    """The actor meshes; an actor mesh without a policy has that of its proc mesh."""

    def __init__(self, local: LocalProc) -> None:
        super().__init__(local)
        self.procs: dict[str, OwnedProcs] = {}
        self.actors: dict[str, OwnedActors] = {}
        self._stopped: dict[str, list[str]] = {}
        """Actors that were stopped, by the proc mesh that they were on."""
        local.on_event |= {
            "actor_failed": self._on_actor_failed,
            "kept_on_disk": self._on_kept_on_disk,
            "actors_stopped": self._on_actors_stopped,
            "actor_abandoned": lambda fields: self._on_abandoned(fields["actor"]),
        }

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
