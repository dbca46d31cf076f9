"""Actors and endpoints as a user defines them, and the table of endpoints that the runtime reads from a class."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar, overload
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from .calls.adverbs import Endpoint, StreamingEndpoint
    from .calls.port import Port
    from .shapes.mesh_trait import MeshTrait

    class _ActorHandle(MeshTrait):
        """What type checkers see of an actor mesh beside the endpoints: ``spawn`` returns a mesh typed as its actor."""

        @property
        def initialized(self) -> Any: ...
        def stop(self, reason: str = ..., *, timeout: float | None = ...) -> Any: ...
        def healthy(self) -> Any: ...
        def replace(self, *ranks: int, force: bool = ...) -> Any: ...

else:
    _ActorHandle = object

P = ParamSpec("P")
R = TypeVar("R")

_MARK: Final = "__danaus_endpoint__"
_tables: WeakKeyDictionary[type, dict[str, EndpointSpec]] = WeakKeyDictionary()


class Actor(_ActorHandle):
    """Base class of actors: a plain Python object in one process that handles one message at a time.

    ``__init__`` runs remotely, once per rank, on the thread that the actor keeps for its whole life. Define
    ``__cleanup__(self, exc)`` (sync or async) to be called when the actor is stopped (``exc`` is None) or has failed.

    Further hooks, each optional, sync or async, on the actor's thread:

    * ``__supervise__(self, failure)`` hears of a loss in a mesh that this actor spawned; to return something true is to
      have handled it, to raise fails this actor.
    * ``restore(self, state)`` gets what was last handed to :func:`danaus.checkpoint`, where the actor is made again;
      called after ``__init__``.
    * ``__drain__(self, seconds)`` is called when the host is to be taken away in so many seconds: time to checkpoint.

    Example:
        >>> from danaus import Actor, endpoint, this_proc
        >>> class Greeter(Actor):
        ...     @endpoint
        ...     def greet(self, name: str) -> str:
        ...         return f"hello {name}"
        >>> greeter = this_proc().spawn("greeter", Greeter)
        >>> greeter.greet.call_one("world").get(timeout=10)
        'hello world'
        >>> greeter.stop().get(timeout=10)
    """


class EndpointKind(Enum):
    """What kind of function an endpoint is."""

    SYNC = auto()
    ASYNC = auto()
    GENERATOR = auto()
    ASYNC_GENERATOR = auto()

    @property
    def is_stream(self) -> bool:
        """Whether the caller iterates."""
        return self in {EndpointKind.GENERATOR, EndpointKind.ASYNC_GENERATOR}

    @property
    def needs_loop(self) -> bool:
        """Whether it runs on the actor's event loop."""
        return self in {EndpointKind.ASYNC, EndpointKind.ASYNC_GENERATOR}


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointOptions:
    """What the decorator says about an endpoint."""

    concurrency: int = 1
    explicit_response_port: bool = False
    borrow: bool = False
    idempotent: bool = False


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    """One endpoint of a class, as caller and actor both see it."""

    name: str
    owner: str
    kind: EndpointKind
    options: EndpointOptions
    check: Callable[..., None]
    """Takes the call's arguments and raises TypeError where they do not fit the signature."""
    parameters: frozenset[str]
    is_stream: bool
    needs_loop: bool

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}"


if TYPE_CHECKING:

    @overload
    def endpoint(  # pyright: ignore[reportOverlappingOverload]  the last one takes any method, on purpose
        method: Callable[Concatenate[Any, P], AsyncIterator[R]], /
    ) -> StreamingEndpoint[P, R]: ...
    @overload
    def endpoint(method: Callable[Concatenate[Any, P], Iterator[R]], /) -> StreamingEndpoint[P, R]: ...
    @overload
    def endpoint(method: Callable[Concatenate[Any, P], Awaitable[R]], /) -> Endpoint[P, R]: ...
    @overload
    def endpoint(method: Callable[Concatenate[Any, P], R], /) -> Endpoint[P, R]: ...
    @overload
    def endpoint(
        *, concurrency: int = ..., borrow: bool = ..., idempotent: bool = ...
    ) -> Callable[[Callable[Concatenate[Any, P], Awaitable[R] | R]], Endpoint[P, R]]: ...
    @overload
    def endpoint(
        *, explicit_response_port: bool, concurrency: int = ..., borrow: bool = ...
    ) -> Callable[[Callable[Concatenate[Any, Port[R], P], object]], Endpoint[P, R]]: ...


def endpoint(
    method: Any = None,
    /,
    *,
    concurrency: int = 1,
    explicit_response_port: bool = False,
    borrow: bool = False,
    idempotent: bool = False,
) -> Any:
    """Mark a method of an actor as remotely callable; sync, async, generator and async generator methods may mix.

    Args:
        method: The method, when used without parentheses.
        concurrency: How many calls of this endpoint may overlap, each at its awaits; async methods only.
        explicit_response_port: The method gets a :class:`Port` as its first argument and answers on it when it likes,
            possibly after returning. What it raises has no caller to go to and fails the actor.
        borrow: Tensors among the arguments are views of the sender's memory, valid until the last reference is gone
            and never to be written to, instead of private copies.
        idempotent: To run it twice does no harm, so that a caller may ask for ``options(retries=n)``.

    Raises:
        TypeError: The decorated object is no function.
        ValueError: ``concurrency`` above one on a sync method, which has but one thread.
    """
    options = EndpointOptions(
        concurrency=concurrency,
        explicit_response_port=explicit_response_port,
        borrow=borrow,
        idempotent=idempotent,
    )

    def mark(function: Any) -> Any:
        if not inspect.isfunction(function):
            raise TypeError(f"@endpoint: expected a method written with `def` or `async def`, got {function!r}")
        if hasattr(function, _MARK):
            raise TypeError(f"@endpoint: {function.__qualname__} is an endpoint already; use one decorator")
        if concurrency < 1:
            raise ValueError(f"@endpoint(concurrency={concurrency}) on {function.__qualname__}: expected 1 or more")
        if concurrency > 1 and not kind_of(function).needs_loop:
            raise ValueError(
                f"@endpoint(concurrency={concurrency}) on {function.__qualname__}: a sync endpoint has one thread; "
                "write it with `async def`, or spread calls over more actors"
            )
        setattr(function, _MARK, options)
        return function

    return mark if method is None else mark(method)


def concurrent_endpoint(method: Callable[Concatenate[Any, P], Awaitable[R]]) -> Endpoint[P, R]:
    """Mark an async method whose calls overlap without a limit, at its awaits.

    Calls start in arrival order. On stop, those under way are cancelled and awaited before ``__cleanup__``.
    """
    return endpoint(concurrency=1 << 30)(method)  # pyright: ignore[reportReturnType, reportUnknownVariableType]


def kind_of(function: Callable[..., Any]) -> EndpointKind:
    """Return what kind of function ``function`` is."""
    if inspect.isasyncgenfunction(function):
        return EndpointKind.ASYNC_GENERATOR
    if inspect.iscoroutinefunction(function):
        return EndpointKind.ASYNC
    if inspect.isgeneratorfunction(function):
        return EndpointKind.GENERATOR
    return EndpointKind.SYNC


def endpoints_of(actor_class: type) -> dict[str, EndpointSpec]:
    """Return the endpoints of a class by name, inherited ones included.

    Raises:
        TypeError: ``actor_class`` is no class derived from :class:`Actor`, or an endpoint of it is no plain method.
        ValueError: An endpoint has the name of something that every actor mesh has.
    """
    if not (inspect.isclass(actor_class) and issubclass(actor_class, Actor)):
        raise TypeError(f"expected a class derived from danaus.Actor, got {actor_class!r}")
    cached = _tables.get(actor_class)
    if cached is not None:
        return cached
    table: dict[str, EndpointSpec] = {}
    for name in dir(actor_class):
        function = inspect.getattr_static(actor_class, name)
        wrapped = getattr(function, "__func__", None) or getattr(function, "fget", None)
        if hasattr(wrapped, _MARK):
            raise TypeError(
                f"{actor_class.__qualname__}.{name}: an endpoint is a plain method; leave out {type(function).__name__}"
            )
        if hasattr(function, _MARK):
            if name in reserved_names() or name.startswith("__"):
                raise ValueError(
                    f"{actor_class.__qualname__}.{name}: every actor mesh has an attribute of this name; rename it"
                )
            table[name] = spec_of(actor_class, name, function)
    _tables[actor_class] = table
    return table


def reserved_names() -> frozenset[str]:
    """Names that endpoints cannot have, because an actor mesh has them."""
    from .actor_mesh import ActorMesh

    return frozenset(dir(ActorMesh)) | ActorMesh.FIELDS


def spec_of(actor_class: type, name: str, function: Any, options: EndpointOptions | None = None) -> EndpointSpec:
    """Describe one method as an endpoint."""
    chosen = options or getattr(function, _MARK, None) or EndpointOptions()
    skipped = 2 if chosen.explicit_response_port else 1
    qualified = f"{actor_class.__qualname__}.{name}"
    parameters = list(inspect.signature(function).parameters.values())[skipped:]
    return EndpointSpec(
        name,
        actor_class.__qualname__,
        kind_of(function),
        chosen,
        signature_check(qualified, parameters),
        frozenset(parameter.name for parameter in parameters),
        kind_of(function).is_stream,
        kind_of(function).needs_loop,
    )


def signature_check(qualified: str, parameters: list[inspect.Parameter]) -> Callable[..., None]:
    """Return a function of these parameters that does nothing: calling it is the interpreter's own, fast check."""
    empty = inspect.Parameter.empty
    bare = [p.replace(annotation=empty, default=empty if p.default is empty else None) for p in parameters]
    try:
        source = f"def check{inspect.Signature(bare)}: pass"
        namespace: dict[str, Any] = {}
        exec(source, namespace)  # noqa: S102  built from parameter names alone
    except (ValueError, SyntaxError):
        return lambda *_args, **_kwargs: None
    check = namespace["check"]
    check.__name__ = qualified.rsplit(".", 1)[-1]
    check.__qualname__ = qualified
    return check
