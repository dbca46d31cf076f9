"""Runs scripts written for torchrun on a mesh of processes, unchanged.

Every process finds the environment that torchrun would give it. MASTER_ADDR and MASTER_PORT lead to a store in a
process of its own, beside rank 0: it is there before any rank looks for it, its port is one that it holds already, and
no rank has the store's threads in it when the script forks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..runtime import Actor, context, endpoint, this_host
from ..runtime.address import host_of, incarnation_of
from ..runtime.collectives.meeting import exchange, places_of
from ..runtime.collectives.root_cause import news_limit_of
from ..runtime.script import exit_code_of, run_module, run_script, run_to_the_end
from .torchrun import Placement, shared_devices

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from ..runtime import ProcMesh

MEET_LIMIT_S: Final = 300.0
"""How long the ranks wait for each other before the script starts."""

END_LIMIT_S: Final = 1.0
"""How long after the news of a lost rank the others may have to be ended."""


class ScriptFailedError(RuntimeError):
    """A script ended with a code other than 0."""

    def __init__(self, script: str, code: int) -> None:
        super().__init__(script, code)
        self.script, self.code = script, code

    def __str__(self) -> str:
        return f"{self.script} exited with code {self.code}"


class MasterStore(Actor):
    """The store that ranks meet at: torch's TCPStore, on a port that was free."""

    def __init__(self, host: str) -> None:
        from torch._C._distributed_c10d import TCPStore

        # Ours to the end: torch's own listener would take every interface of the host.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family, backlog=1024) as listener:
            self._port = listener.getsockname()[1]
            descriptor = os.dup(listener.fileno())
        self._store = TCPStore(host, self._port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)

    @endpoint
    def port(self) -> int:
        """Return its port."""
        return self._port


class SPMDActor(Actor):
    """Runs one script on all processes of a mesh, with torchrun's environment.

    It has to be the first actor on its processes, so that scripts run on their main threads. ``danaus run --nproc`` is
    this, with logs and restarts.

    Args:
        max_restarts: What TORCHELASTIC_MAX_RESTARTS is to say; restarts are a matter of the processes' policy.
        preload: Modules that the process of the store finds imported: best those that these processes were spawned
            with, whose zygote is there already.
    """

    def __init__(self, *, max_restarts: int = 0, preload: Sequence[str] | None = None) -> None:
        self._max_restarts, self._preload = max_restarts, preload
        self._num_meetings = 0
        self._master: ProcMesh | None = None

    @endpoint
    def incarnation(self) -> int:
        """Return how often this process has been started again."""
        return incarnation_of(context().actor_instance.proc_id)

    @endpoint
    def setup_env(
        self, master_addr: str | None = None, master_port: int | None = None, restart_count: int | None = None
    ) -> dict[str, str]:
        """Set the environment that torchrun would set, so that ``init_process_group()`` finds the others.

        All ranks have to be called. The store that they find lives as long as this actor of rank 0.

        Args:
            master_addr: Where rank 0 is to start a store itself, together with ``master_port``; by default one runs.
            master_port: A port that is free there.
            restart_count: By default how often this process has been started again.

        Returns:
            What was set.

        Raises:
            TimeoutError: Some ranks were not called.
            ValueError: Of ``master_addr`` and ``master_port`` only one is given.
        """
        return self._set_up(restart_count, master_addr, master_port)

    @endpoint
    def main(self, args: Sequence[str], *, restart_count: int | None = None, as_process: bool = False) -> None:
        """Run a script as `__main__` with torchrun's environment; all ranks have to be called.

        Args:
            args: As after torchrun's own options: a file and its arguments, or ``-m``, a module and its arguments.
            restart_count: See :meth:`setup_env`.
            as_process: Whether the script is all that these processes are for. It then ends as a process does: exit
                hooks run, threads are waited for, and where it fails, the process exits with its code, which fails the
                call and is for the restart policy to answer.

        Raises:
            ValueError: ``args`` names no script.
            RuntimeError: This is not the main thread.
            ScriptFailedError: The script has exited with a code other than 0.
            Exception: What the script raised.
        """
        script, *arguments = args if args and args[0] != "-m" else args[1:] or [""]
        if not script:
            raise ValueError(f'SPMDActor.main({list(args)!r}): expected ["script.py", ...] or ["-m", "module", ...]')
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "SPMDActor.main: another actor has the main thread of this process, which scripts need for their "
                "signals; spawn SPMDActor before other actors, or on processes of its own"
            )
        self._set_up(restart_count)
        run = run_module if args[0] == "-m" else run_script
        with self._as_script(as_process):
            if as_process:
                run_to_the_end(partial(run, script, arguments), follows_within_s=_follows_within_s)
                return
            try:
                run(script, arguments)
            except SystemExit as ended:
                code = exit_code_of(ended)
                if code:
                    raise ScriptFailedError(script, code) from None

    def __drain__(self, seconds: float) -> None:
        """Be waited for where the host is taken away; a script hears of it by SIGTERM, as under torchrun."""

    def _set_up(
        self, restart_count: int | None, master_addr: str | None = None, master_port: int | None = None
    ) -> dict[str, str]:
        if (master_addr is None) != (master_port is None):
            raise ValueError(f"setup_env({master_addr=}, {master_port=}): give both, or none")
        instance = context().actor_instance
        hosts = tuple(map(host_of, places_of(instance)))
        placement = Placement(rank=instance.rank.rank, hosts=hosts)
        own: dict[str, Any] = {"devices": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
        if placement.rank == 0 and master_addr is None:
            own["master"] = self._start_master()
        said = self._exchange(own)
        address, port = (master_addr, master_port) if master_addr is not None else said[0]["master"]
        restarts = incarnation_of(instance.proc_id) if restart_count is None else restart_count
        variables = placement.environment() | {
            "MASTER_ADDR": str(address),
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RESTART_COUNT": str(restarts),
            "TORCHELASTIC_MAX_RESTARTS": str(self._max_restarts),
            "TORCHELASTIC_RUN_ID": instance.key,
            "TORCHELASTIC_USE_AGENT_STORE": str(master_addr is None),
        }
        devices = shared_devices([said[rank]["devices"] for rank in placement.neighbours])
        if devices is not None and not _uses_cuda():
            variables["CUDA_VISIBLE_DEVICES"] = devices
        variables["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        os.environ.update(variables)
        return variables

    def _start_master(self) -> tuple[str, int]:
        if self._master is not None:
            self._master.stop().get()
        address = context().actor_instance.proc_runtime.host_address
        self._master = this_host().spawn_procs(name="master-store", gpus="none", preload=self._preload)
        store: Any = self._master.spawn("master-store", MasterStore, address)
        return address, store.port.call_one().get(MEET_LIMIT_S)

    def _exchange(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        self._num_meetings += 1
        topic = f"start {self._num_meetings}"
        said = exchange(context().actor_instance, topic, json.dumps(own).encode(), timeout_s=MEET_LIMIT_S)
        return [json.loads(each) for each in said]

    @contextlib.contextmanager
    def _as_script(self, as_process: bool) -> Generator[None]:
        """Be what a script expects of its process, and afterwards what it was, unless it is the script's for good."""
        local = context().actor_instance.proc_runtime
        before = {name: local.on_event[name] for name in ("stop", "drain")}
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        main, path, arguments = sys.modules["__main__"], list(sys.path), list(sys.argv)

        def terminate(name: str, fields: dict[str, Any]) -> None:
            before[name](fields)
            # Else it would end the process before other actors have cleaned up.
            if as_process or signal.getsignal(signal.SIGTERM) is not handlers[signal.SIGTERM]:
                os.kill(os.getpid(), signal.SIGTERM)

        for name in before:
            local.on_event[name] = lambda fields, name=name: terminate(name, fields)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if as_process:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            yield
        finally:
            local.on_event.update(before)
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
            if not as_process:
                sys.modules["__main__"] = main
                sys.path[:], sys.argv[:] = path, arguments


def _follows_within_s(error: BaseException) -> float:
    news_s = news_limit_of(error, places_of(context().actor_instance))
    return news_s and news_s + END_LIMIT_S


def _uses_cuda() -> bool:
    torch: Any = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def setup_torch_elastic_env(
    procs: ProcMesh, master_addr: str | None = None, master_port: int | None = None
) -> SPMDActor:
    """Set torchrun's environment in the processes of a mesh, so that ``init_process_group()`` finds the others.

    Returns:
        What holds the store that they meet at; it lives as long as the processes, or until it is stopped.
    """
    spmd: Any = procs.spawn("torch-elastic", SPMDActor)
    spmd.setup_env.call(master_addr, master_port).get()
    return spmd
