"""Hosts on a Ray cluster that runs already: each daemon is the child of a Ray actor, in one placement group.

The actors are detached: they outlive the script, and another one finds them by the job's record. The key is an argument
of the actors, so whoever may run code on the Ray cluster can read it; that person could run code on these nodes anyhow.
Ray is an extra (``ray``) and is imported when it is needed.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import secrets
import signal
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

from .errors import Attempt, JobError, LaunchError
from .job import Job
from .spec import HostRecord, JobSpec

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable
    from pathlib import Path

    from .ray_host import Look
    from .state import Record

NAMESPACE: Final = "danaus"
"""Ray's namespace of the actors."""
STRATEGIES: Final = ("STRICT_SPREAD", "SPREAD", "PACK", "STRICT_PACK")
PLACED: Final = "CREATED"
"""State of a placement group whose bundles all have a node."""
LOOK_S: Final = 5.0
"""How long the actors have to answer; one that does not is pending, or its node cannot be reached."""
END_GRACE_S: Final = 15.0
"""Time for a daemon to end its agents after SIGTERM."""


@dataclass(frozen=True, kw_only=True)
class RaySpec(JobSpec):
    """What is asked for."""

    kind: ClassVar[str] = "ray"

    hosts: int = 1
    """How many hosts."""
    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    """What each takes from its node, by Ray's names."""
    address: str = "auto"
    """Address of the Ray cluster; by default the one that this machine belongs to."""
    strategy: str = "STRICT_SPREAD"
    """How hosts are placed on Ray's nodes."""
    runtime_env: dict[str, Any] = field(default_factory=dict[str, Any])
    """Ray's runtime environment of the daemons."""
    env: dict[str, str] = field(default_factory=dict[str, str])
    """Environment variables of the daemons."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hosts < 1:
            raise ValueError(f"a ray job's hosts={self.hosts!r}: expected a number of hosts, 1 or more")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"a ray job's strategy={self.strategy!r}: expected one of {', '.join(STRATEGIES)}")
        if not self.resources or any(amount <= 0 for amount in self.resources.values()):
            raise ValueError(
                f"a ray job's resources={self.resources!r}: expected amounts above 0 by Ray's names, as "
                "{'CPU': 8, 'GPU': 8}"
            )


class RayJob(Job[RaySpec]):
    """Hosts on an existing Ray cluster.

    Args:
        hosts: How many.
        resources: What each takes from its node, by Ray's names, as ``{"CPU": 16, "GPU": 8}``; GPUs that are not asked
            for are hidden by Ray.
        address: Address of the cluster, as for ``ray.init``; a script that is connected to Ray already uses that one.
        strategy: ``STRICT_SPREAD`` puts each host on a node of its own, ``SPREAD`` tries to.
        runtime_env: Ray's runtime environment for the daemons; danaus of this version must be in it, or on the nodes.
        env: Environment variables of the daemons.
        name: By which other scripts find the job.
        replace_lost: How many lost hosts are replaced, on any node that has the resources.
    """

    default_timeout_s: ClassVar[float] = 300.0

    def __init__(
        self,
        *,
        hosts: int = 1,
        resources: dict[str, float] | None = None,
        address: str = "auto",
        strategy: str = "STRICT_SPREAD",
        runtime_env: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        name: str = "",
        replace_lost: int = 0,
    ) -> None:
        super().__init__(
            RaySpec(
                hosts=hosts,
                resources={key: float(value) for key, value in (resources or {"CPU": 1.0}).items()},
                address=address,
                strategy=strategy,
                runtime_env=dict(runtime_env or {}),
                env=dict(env or {}),
                name=name,
                replace_lost=replace_lost,
            )
        )
        # Of those that this process made: only these tell why an actor has ended.
        self._handles: dict[str, Any] = {}

    def render(self) -> str:
        spec = self.spec
        lines = [
            f"Ray cluster:      {spec.address}",
            f"placement group:  {spec.hosts} x {spec.resources}, strategy {spec.strategy}, detached",
            f"actors:           {spec.hosts}, detached, in namespace {NAMESPACE!r}, one in each bundle",
            f"each runs:        danaus host --listen tcp://NODE:0 --key - --name {self.name}-INDEX",
        ]
        return "\n".join([*lines, *([f"runtime_env:      {spec.runtime_env}"] if spec.runtime_env else []), ""])

    def logs(self, host: int, *, lines: int = 200) -> str:
        ray = self._connect()
        name = self._record().launched["actors"][host]
        try:
            return ray.get(self._handle(ray, name).last_lines.remote(lines), timeout=LOOK_S)
        except (ValueError, ray.exceptions.RayError) as error:
            raise JobError(f"job {self.name!r}: host {host}: {_reason(error)}, and its output with it") from error

    def _launch(self, directory: Path, key_file: Path) -> dict[str, Any]:  # noqa: ARG002  output stays on the nodes
        ray = self._connect()
        group = _ray_module("ray.util.placement_group").placement_group(
            [dict(self.spec.resources) for _ in range(self.spec.hosts)],
            strategy=self.spec.strategy,
            name=f"danaus-{self.name}-{secrets.token_hex(4)}",
            lifetime="detached",
        )
        try:
            actors = [self._make_actor(group, key_file, index) for index in range(self.spec.hosts)]
        except BaseException as error:
            _remove_group(group)
            if isinstance(error, (ValueError, TypeError, ray.exceptions.RayError)):
                attempt = Attempt("Ray", "a placement group and its actors", None, str(error))
                raise LaunchError(self.name, (attempt,)) from error
            raise
        return {"group": group.id.hex(), "actors": actors}

    def _make_actor(self, group: Any, key_file: str | Path, index: int) -> str:
        from ..network.keys import format_key, read_key_file
        from .ray_host import as_ray_actor

        name = f"{self.name}-{index}-{secrets.token_hex(4)}"
        place = _ray_module("ray.util.scheduling_strategies").PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=index
        )
        actor_class = as_ray_actor(
            self.spec.resources, self.spec.runtime_env, name=name, namespace=NAMESPACE, scheduling_strategy=place
        )
        key = format_key(read_key_file(key_file)).decode()
        self._handles[name] = actor_class.remote(key, f"{self.name}-{index}", self.spec.env)
        return name

    def _observe(self, record: Record) -> tuple[list[HostRecord], str]:
        ray = self._connect()
        actors: list[str] = record.launched["actors"]
        asked: dict[int, Any] = {}
        hosts: dict[int, HostRecord] = {}
        for index, name in enumerate(actors):
            try:
                asked[index] = self._handle(ray, name).look.remote()
            except ValueError:
                hosts[index] = HostRecord(index, name, "", "ended", "its Ray actor is gone, with its node or by a kill")
        group = _group_state(record.launched["group"])
        answered = set(_answered(ray, asked.values(), limit_s=LOOK_S if group == PLACED else 0.0))
        for index, reference in asked.items():
            if reference in answered:
                hosts[index] = _host(ray, index, actors[index], reference)
            else:
                said = "no answer from its Ray actor" if group == PLACED else "its place is waited for"
                hosts[index] = HostRecord(index, actors[index], "", "pending", said)
        return [hosts[index] for index in range(len(actors))], f"placement group {group.lower()}"

    def _replace(self, record: Record, index: int) -> dict[str, Any]:
        ray = self._connect()
        actors: list[str] = list(record.launched["actors"])
        group = _group(record.launched["group"])
        self._end_actors(ray, [actors[index]], record.launched["group"])
        # A node that was lost took its bundle along; Ray finds another place for it.
        actors[index] = self._make_actor(group, record.key_file, index)
        return {**record.launched, "actors": actors}

    def _end(self, record: Record) -> None:
        if "group" in record.launched:
            self._end_actors(self._connect(), record.launched["actors"], record.launched["group"])
            _remove_group(_group(record.launched["group"]))

    def _end_actors(self, ray: Any, names: Iterable[str], group: str) -> None:
        """End daemons first, with the time that they need, then the actors."""
        handles: list[Any] = []
        for name in names:
            with contextlib.suppress(ValueError):
                handles.append(self._handle(ray, name))
            self._handles.pop(name, None)
        ending = [handle.end.remote(END_GRACE_S) for handle in handles]
        # Without a place there are no actors yet that could answer.
        _answered(ray, ending, limit_s=END_GRACE_S + LOOK_S if _group_state(group) == PLACED else 0.0)
        for handle in handles:
            ray.kill(handle)

    def _handle(self, ray: Any, name: str) -> Any:
        """Return an actor's handle; ValueError if it is gone."""
        return self._handles[name] if name in self._handles else ray.get_actor(name, namespace=NAMESPACE)

    def _connect(self) -> Any:
        """Return the module ``ray``, connected to the cluster."""
        try:
            ray = importlib.import_module("ray")
        except ImportError as error:
            raise JobError("RayJob needs Ray, which is not installed here: pip install 'danaus[ray]'") from error
        if ray.is_initialized():
            return ray
        try:
            with _own_signals():
                ray.init(
                    address=self.spec.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise JobError(
                f"job {self.name!r}: no connection to the Ray cluster {self.spec.address!r}: {error}; start one with "
                "`ray start --head`, or give its address=, as HOST:6379"
            ) from error
        return ray


@contextlib.contextmanager
def _own_signals() -> Generator[None]:
    """Keep the handler of SIGTERM, which ``ray.init`` replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _host(ray: Any, index: int, name: str, reference: Any) -> HostRecord:
    try:
        look: Look = ray.get(reference)
    except ray.exceptions.RayError as error:
        is_away = isinstance(error, ray.exceptions.ActorUnavailableError)
        return HostRecord(index, name, "", "pending" if is_away else "ended", _reason(error))
    if look.code is not None:
        return HostRecord(index, look.node, "", "ended", f"it ended with code {look.code}\n{look.last_lines}")
    return HostRecord(index, look.node, look.address, "running" if look.address else "pending")


def _reason(error: Exception) -> str:
    """The part of Ray's long messages that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = [line for line in lines if "Error" in line]
    return (cause or lines or ["its Ray actor is gone"])[-1]


def _answered(ray: Any, references: Iterable[Any], *, limit_s: float) -> list[Any]:
    waiting = list(references)
    return ray.wait(waiting, num_returns=len(waiting), timeout=limit_s)[0] if waiting else []


def _group(group_id: str) -> Any:
    made = _ray_module("ray").PlacementGroupID(bytes.fromhex(group_id))
    return _ray_module("ray.util.placement_group").PlacementGroup(made)


def _group_state(group_id: str) -> str:
    """What Ray says of the placement group, as ``CREATED``."""
    found = _ray_module("ray.util.placement_group").placement_group_table(_group(group_id))
    return str(found.get("state", "REMOVED"))


def _remove_group(group: Any) -> None:
    _ray_module("ray.util.placement_group").remove_placement_group(group)


def _ray_module(name: str) -> Any:
    # By name: Ray's own types are incomplete, and without the extra there are none.
    return importlib.import_module(name)
