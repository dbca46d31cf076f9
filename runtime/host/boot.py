"""What a new mesh of processes needs to start: put together by the spawner, carried out by agent, zygote and proc.

The agent sees plain data only. What has to be unpickled (the bootstrap function) lies in a private file that each proc
reads for itself.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import cloudpickle

from ..address import file_name, per_host_of, slots_of
from ..workspace.paths import packed_workspaces
from .admission import Need, admit, read_limits
from .cpus import read_topology, resolve_bindings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..proc import LocalProc

_PRELOADED_BY_DEFAULT: Final = ("numpy", "torch")
_MIB: Final = 1 << 20
_IMPORT_TIME: Final = (
    "OMP_",
    "MKL_",
    "OPENBLAS_",
    "TORCH",
    "PYTORCH_",
    "CUDA_",
    "NCCL_",
    "GLOO_",
    "TRITON_",
    "PYTHON",
    "LD_",
)


@dataclass(frozen=True, slots=True)
class BootPlan:
    """A spawn request, ready to be sent to the host agent."""

    fields: dict[str, Any]
    boot: bytes
    """Content of the file that each process reads when it starts."""

    def submit(self, local: LocalProc) -> None:
        """Send it."""
        local.request("spawn", self.fields)


@dataclass(frozen=True, slots=True)
class BootFile:
    """What each proc of a mesh reads when it starts."""

    sys_path: list[str]
    directory: str
    bootstrap: Callable[[], object] | None
    argv0: str


def make_plan(
    local: LocalProc,
    *,
    mesh_id: str,
    name: str,
    count: int,
    dims: Sequence[tuple[str, int]],
    spares: int,
    restartable: bool,
    bootstrap: Callable[[], object] | None,
    env: Mapping[str, str],
    preload: Sequence[str] | None,
    proc_bind: Sequence[Mapping[str, str]] | None,
    gpus: str,
) -> BootPlan:
    """Check a spawn, against this host where it is to have some of the processes, and describe it.

    Raises:
        AdmissionError: This host's limits do not allow so many more processes.
        ValueError: A setting is malformed.
    """
    if gpus not in {"own", "shared", "none"}:
        raise ValueError(f'spawn_procs(gpus={gpus!r}): expected "own", "shared" or "none"')
    if bootstrap is not None and not callable(bootstrap):
        raise TypeError(f"spawn_procs(bootstrap={bootstrap!r}): expected a function without parameters, or None")
    for key, value in env.items():
        if not isinstance(key, str) or not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"spawn_procs(env=...): names and values are text; got {key!r}: {value!r}")
    if isinstance(preload, str):
        raise TypeError(f"spawn_procs(preload={preload!r}): expected a list of modules, as in preload=[{preload!r}]")
    modules = tuple(_default_preload() if preload is None else dict.fromkeys(preload))
    slots, per_host = slots_of(mesh_id), per_host_of(mesh_id) or count
    if local.slot in slots:
        admit(per_host + spares, read_limits(), Need(memory_bytes=(25 if "torch" in modules else 16) * _MIB))
    bindings = [] if proc_bind is None else resolve_bindings(proc_bind, num_procs=per_host, topology=read_topology())
    boot = _dump_boot(bootstrap)
    fields = {
        "mesh": mesh_id,
        "name": name,
        "count": count,
        "procs": [f"{mesh_id}.{rank}" for rank in range(count)],
        "dims": list(dims),
        "spares": spares,
        "restartable": restartable,
        "env": dict(env),
        "preload": modules,
        "zygote": _zygote_key(modules, env),
        "zygote_env": {key: value for key, value in env.items() if key.startswith(_IMPORT_TIME)},
        "sys_path": list(sys.path),
        "workspaces": packed_workspaces(local, [*sys.path, os.getcwd()]),
        "boot_file": write_boot_file(local, mesh_id, boot) if local.slot in slots else "",
        "boot": boot if slots != (local.slot,) else b"",
        "cpus": [None if binding.cpus is None else sorted(binding.cpus) for binding in bindings],
        "mem_nodes": [None if binding.mem_nodes is None else sorted(binding.mem_nodes) for binding in bindings],
        "gpus": gpus,
    }
    return BootPlan(fields, boot)


def _default_preload() -> list[str]:
    return [module for module in _PRELOADED_BY_DEFAULT if module in sys.modules]


def _zygote_key(modules: Sequence[str], env: Mapping[str, str]) -> str:
    """Name the zygote that may be used: it has imported the same code under the same environment."""
    digest = hashlib.blake2b(digest_size=8)
    for module in modules:
        try:
            spec = importlib.util.find_spec(module)
        except (ModuleNotFoundError, ValueError):
            # Its package is not there either, or it is the script itself.
            spec = None
        if spec is None:
            raise ValueError(
                f"spawn_procs(preload=...): there is no module {module!r} here; check the name and sys.path"
            )
        digest.update(module.encode())
        if spec.origin and os.path.exists(spec.origin):
            status = os.stat(spec.origin)
            digest.update(f"{spec.origin} {status.st_mtime_ns} {status.st_size}".encode())
    for key in sorted(env):
        if key.startswith(_IMPORT_TIME):
            digest.update(f"{key}={env[key]}\n".encode())
    return digest.hexdigest() if modules else "plain"


def _dump_boot(bootstrap: Callable[[], object] | None) -> bytes:
    boot = BootFile(list(sys.path), os.getcwd(), bootstrap, sys.argv[0] if sys.argv else "")
    try:
        return cloudpickle.dumps(boot)
    except Exception as error:
        raise TypeError(f"spawn_procs(bootstrap=...): {bootstrap!r} cannot be pickled: {error}") from error


def write_boot_file(local: LocalProc, mesh_id: str, boot: bytes) -> str:
    """Put what the processes of a mesh read into the job's directory, if it is not there; return the path."""
    # Whoever dies before it has ordered the mesh leaves a file that only its own name tells apart.
    path = os.path.join(local.job_directory(), f"{file_name(mesh_id)}.boot@{file_name(local.proc_id)}")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return path
    with os.fdopen(descriptor, "wb") as file:
        file.write(boot)
    return path


def read_boot_file(path: str) -> BootFile:
    """Load what :func:`make_plan` wrote; runs user code (unpickles the bootstrap function)."""
    import pickle

    boot = pickle.loads(Path(path).read_bytes())  # noqa: S301  only authenticated peers of the job reach this
    if not isinstance(boot, BootFile):
        raise TypeError(f"{path}: expected a BootFile, got {type(boot).__qualname__}")
    return boot
