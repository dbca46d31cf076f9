"""A space of keys in a proc's store actor, as torch's Store: what process groups form through."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from ..address import place_of
from ..context import is_running, local_proc
from ..errors import ActorError, DanausError
from .store import store_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..calls.future import Future

_SPARE_S: Final = 10.0
"""How much longer than a store's own limit its proc may take to answer."""


def wait_here(future: Future[Any]) -> Any:
    """Block for ``future``, also on a thread whose event loop runs: forming a group blocks, as its collectives do."""
    loop = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    try:
        return future.get()
    finally:
        asyncio._set_running_loop(loop)


class StoreState:
    """What a store and its clones share.

    Attributes:
        refusal: Why it is not to be used any more, once its group's generation has ended.
        published: What this process has set in it.
    """

    def __init__(self) -> None:
        self.refusal: str | None = None
        self.published: dict[str, bytes] = {}


class RuntimeStore(Store):
    """A space of keys in a proc's store actor, as torch's Store.

    Whoever uses it keeps it alive: known to C++ alone, a store loses its Python methods. Every method raises
    ``DistStoreError`` where the serving proc is gone, the group has ended or the time is over.

    Args:
        proc_id: The serving proc.
        space: Name of the space.
        timeout_s: How long ``get`` and ``wait`` wait for a key.
        follows: Whether to go on with the next incarnation of the serving proc, whose keys start empty.
    """

    if TYPE_CHECKING:
        timeout: timedelta

    def __init__(self, proc_id: str, space: str, *, timeout_s: float, follows: bool = False) -> None:
        super().__init__()
        self._proc_id, self._space, self._follows = proc_id, space, follows
        self._server = store_in(proc_id)
        self._runtime = local_proc()
        self._clones: list[RuntimeStore] = []
        self.set_timeout(timedelta(seconds=timeout_s))
        self.limit_s: float | None = timeout_s
        """No wait lasts longer than this, whatever the caller says; set while a group forms."""
        self.state = StoreState()

    def _ask(self, method: str, *args: Any, timeout_s: float = 0.0) -> Any:
        if not is_running(self._runtime):
            raise dist.DistStoreError(f"store of {self._space}: the runtime of this process has ended")
        if self._follows:
            self._proc_id = self._runtime.resolve(place_of(self._proc_id))
        elif self._proc_id in self._runtime.gone:
            self.state.refusal = self.state.refusal or f"{self._proc_id}, where it was, is gone"
        if self.state.refusal is not None:
            raise dist.DistStoreError(f"store of {self._space}: {self.state.refusal}")
        try:
            call = getattr(self._server, method).options(timeout=timeout_s + _SPARE_S)
            return wait_here(call.call_one(self._space, *args))
        except ActorError as error:
            raise dist.DistStoreError(f"store of {self._space}: {error.exception or error}") from None
        except DanausError as error:
            raise dist.DistStoreError(f"store of {self._space} in {self._proc_id}: {error}") from error

    def _limited(self, timeout: timedelta | None) -> float:
        asked_s = (self.timeout if timeout is None else timeout).total_seconds()
        return asked_s if self.limit_s is None else min(asked_s, self.limit_s)

    def set(self, key: str, value: str | bytes) -> None:
        self.multi_set([key], [value])

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        items = {key: _as_bytes(value) for key, value in zip(keys, values, strict=True)}
        # Before the refusal is looked at: whoever refuses looks at these afterwards.
        if not self._follows:
            self.state.published.update(items)
        self._ask("put", items)

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        timeout_s = self._limited(None)
        return self._ask("get", list(keys), timeout_s, timeout_s=timeout_s)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        timeout_s = self._limited(timeout)
        self._ask("wait", list(keys), timeout_s, timeout_s=timeout_s)

    def add(self, key: str, value: int) -> int:
        return self._ask("add", key, value)

    def append(self, key: str, value: str | bytes) -> None:
        self._ask("append", key, _as_bytes(value))

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        return self._ask("compare_set", key, _as_bytes(expected_value), _as_bytes(desired_value))

    def check(self, keys: Sequence[str]) -> bool:
        return set(self.list_keys()) >= set(keys)

    def list_keys(self) -> list[str]:
        return self._ask("keys")

    def num_keys(self) -> int:
        return len(self.list_keys())

    def delete_key(self, key: str) -> bool:
        return self._ask("delete", key)

    def has_extended_api(self) -> bool:
        return True

    def clone(self) -> RuntimeStore:
        timeout_s = self.timeout.total_seconds()
        clone = RuntimeStore(self._proc_id, self._space, timeout_s=timeout_s, follows=self._follows)
        clone.state = self.state
        self._clones.append(clone)
        return clone

    # The names that C++ looks for.
    getNumKeys = num_keys  # noqa: N815
    deleteKey = delete_key  # noqa: N815


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
