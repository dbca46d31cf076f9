"""Looks at the software that is installed: Python, the packages, the GPUs' driver. Imports nothing heavy."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.host.devices import GpuInventory, read_gpus
from ..runtime.host.stack_taker import find_py_spy
from ..runtime.host.stacks import PR_SET_PTRACER
from .check import Check, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

MIN_PYTHON = (3, 11)
MIN_TORCH = (2, 11)


def check_software() -> Iterator[Check]:
    """Yield a finding for each piece of software that Danaus needs or can use."""
    yield check_python(tuple(sys.version_info[:3]))
    yield check_platform(sys.platform)
    yield check_required("danaus")
    yield check_zmq()
    yield check_required("msgpack")
    yield check_required("cloudpickle")
    torch = read_torch()
    yield check_torch(torch)
    yield check_optional("numpy", "pip install 'danaus[torch]'")
    yield check_optional("triton", "pip install 'danaus[gpu]' (kernels need it)")
    yield check_gpus(read_gpus(), torch)
    yield check_optional("rich", "pip install 'danaus[train]' (progress bars)")
    yield check_optional("tokenizers", "pip install 'danaus[train]' (BPE)")
    yield check_optional("matplotlib", "pip install 'danaus[train]' (plots)")
    yield check_py_spy()


def check_python(version: tuple[int, ...]) -> Check:
    """Python itself."""
    detail = f"{'.'.join(map(str, version))} ({platform.python_implementation()}, {sys.executable})"
    if version[:2] < MIN_PYTHON:
        return Check("python", Status.MISSING, detail, f"use Python {'.'.join(map(str, MIN_PYTHON))} or newer")
    return Check("python", Status.OK, detail)


def check_platform(name: str) -> Check:
    """The operating system."""
    if name != "linux":
        fix = "run it on Linux; from another system, in a container or a virtual machine"
        return Check("platform", Status.MISSING, f"{name}: Danaus needs Linux (pidfd, memfd, /proc)", fix)
    return Check("platform", Status.OK, f"Linux {platform.release()}, {platform.machine()}")


def check_required(package: str) -> Check:
    """A package without which nothing works."""
    version = installed_version(package)
    if version is None:
        return Check(package, Status.MISSING, "not installed", f"pip install {package}")
    return Check(package, Status.OK, version)


def check_optional(package: str, fix: str) -> Check:
    """A package that some parts use."""
    version = installed_version(package)
    if version is None:
        return Check(package, Status.ABSENT, "not installed", fix)
    return Check(package, Status.OK, version)


def check_zmq() -> Check:
    """ZeroMQ, with what the runtime asks of it."""
    try:
        import zmq
    except ImportError as error:
        return Check("pyzmq", Status.MISSING, str(error), "pip install pyzmq")
    detail = f"{zmq.pyzmq_version()} (libzmq {zmq.zmq_version()})"
    fix = "pip install --force-reinstall --only-binary=:all: pyzmq"
    if not zmq.has("ipc"):
        return Check("pyzmq", Status.MISSING, f"{detail}, without ipc", fix)
    if not zmq.has("curve"):
        return Check("pyzmq", Status.WARNING, f"{detail}, without CURVE, which links between hosts need", fix)
    return Check("pyzmq", Status.OK, f"{detail}, with ipc and CURVE")


def read_torch() -> dict[str, Any] | None:
    """Return the constants of torch/version.py (``__version__``, ``cuda``, ...) without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("version.py")
    version = importlib.util.spec_from_file_location("_torch_version", path)
    if version is None or version.loader is None or not path.exists():
        return None
    module = importlib.util.module_from_spec(version)
    version.loader.exec_module(module)
    return vars(module)


def check_torch(torch: dict[str, Any] | None) -> Check:
    """Torch and what it was built for."""
    if torch is None:
        return Check("torch", Status.ABSENT, "not installed; the runtime works without", "pip install 'danaus[torch]'")
    version = str(torch["__version__"])
    built_for = f"CUDA {torch['cuda']}" if torch.get("cuda") else "ROCm" if torch.get("hip") else "CPU"
    numbers = tuple(int(part) for part in version.partition("+")[0].split(".")[:2])
    if numbers < MIN_TORCH:
        least = ".".join(map(str, MIN_TORCH))
        return Check("torch", Status.WARNING, f"{version}, older than {least}", f"pip install 'torch>={least}'")
    return Check("torch", Status.OK, f"{version}, built for {built_for}")


def check_gpus(found: GpuInventory, torch: dict[str, Any] | None) -> Check:
    """The GPUs, and whether torch can use them."""
    if not found.gpus:
        reason = found.reason or "none"
        is_absent = "not installed" in reason and any(Path("/dev").glob("nvidia[0-9]*"))
        fix = "pip install nvidia-ml-py" if is_absent else None
        return Check("gpus", Status.WARNING if is_absent else Status.ABSENT, reason, fix)
    names = ", ".join(f"{gpu.index}: {gpu.name} {gpu.memory_bytes >> 30} GiB" for gpu in found.gpus)
    if torch is not None and not torch.get("cuda"):
        fix = "pip install --force-reinstall torch (a CUDA build)"
        return Check("gpus", Status.WARNING, f"{names}; this torch is built without CUDA", fix)
    return Check("gpus", Status.OK, names)


def check_py_spy() -> Check:
    """py-spy, which reads the stacks of stuck processes: whether it is there, and may look at another process."""
    path = find_py_spy()
    if path is None:
        return Check("py-spy", Status.ABSENT, "not installed", "pip install 'danaus[jobs]' (stacks of stuck processes)")
    version = installed_version("py-spy") or "installed"
    error = _try_py_spy(path)
    if error:
        fix = (
            "docker: --cap-add SYS_PTRACE; until then stuck processes print their stacks themselves, stopped ones none"
        )
        return Check("py-spy", Status.WARNING, f"{version}, but it cannot look at another process: {error}", fix)
    return Check("py-spy", Status.OK, f"{version}, can look at other processes")


def _try_py_spy(path: str) -> str:
    """Have py-spy look at a Python that waits; return why it could not."""
    code = f"from ctypes import CDLL; CDLL(None).prctl({PR_SET_PTRACER}, {os.getpid()}, 0, 0, 0); print(); input()"
    target = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert target.stdout is not None
        target.stdout.readline()
        command = [path, "dump", "--nonblocking", "--json", "--pid", str(target.pid)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    finally:
        target.communicate()
    reason = done.stderr.strip().partition("\n")[0].removeprefix("Error: ")
    return "" if done.returncode == 0 else reason or f"exit code {done.returncode}"


def installed_version(package: str) -> str | None:
    """Return a package's version, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
