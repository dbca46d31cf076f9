"""Actors that exist once in a job, by name; they live in the controller's process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from .actor import Actor, endpoint
from .actor_mesh import ActorMesh
from .mesh import ProcMesh, this_proc
from .messages.credits import DEFAULT_MAILBOX
from .shapes.shape import Region

if TYPE_CHECKING:
    from .calls.future import Future

    A = TypeVar("A", bound=Actor)
else:
    A = TypeVar("A")

REGISTRY_KEY: Final = "@registry"


class Registry(Actor):
    """Holds the job's singletons. One per job, made by the controller when it is first asked."""

    def __init__(self) -> None:
        self._known: dict[str, ActorMesh] = {}

    @endpoint
    def get_or_spawn(self, name: str, actor_class: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ActorMesh:
        """Return the singleton ``name``, made on the first request."""
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = this_proc().spawn(name, actor_class, *args, **kwargs)  # type: ignore[type-var]
        if known._actor_class.__qualname__ != actor_class.__qualname__:
            raise ValueError(
                f"get_or_spawn_controller({name!r}): this name belongs to {known._actor_class.__qualname__}, "
                f"not {actor_class.__qualname__}; choose another"
            )
        # Each time: one that failed or was stopped is an error for every caller.
        known.initialized.get()
        return known


def registry() -> Any:
    """A handle on the job's registry."""
    procs = ProcMesh("controller", "controller", Region((), 0, (), ()))
    return ActorMesh("registry", REGISTRY_KEY, Registry, procs, procs._region, DEFAULT_MAILBOX)


def get_or_spawn_controller(name: str, actor_class: type[A], *args: Any, **kwargs: Any) -> Future[A]:
    """Return a future of the job's only actor called ``name``, made in the controller's process at the first request.

    The same name gives the same actor to every caller; ``__init__``'s arguments count at the first request only.

    Raises:
        ActorError: (from the future) Its ``__init__`` raised, or the name belongs to another class.
    """
    return registry().get_or_spawn.call_one(name, actor_class, args, kwargs)
