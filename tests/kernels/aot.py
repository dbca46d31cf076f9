"""Compiles kernels ahead of time for sm_90, on any machine, and says what they take of a multiprocessor.

The tests' own process interprets kernels, and Triton decides that once per process; so a second process compiles.
Triton's cache in the user's home makes a repetition quick. Run as a script, this file is that process.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

SHARED_MAX = 232448
"""Bytes of shared memory that one block may have on Hopper; a kernel that wants more compiles, but cannot start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """A kernel as production launches it."""

    name: str
    kernel: Any
    """The ``@triton.jit`` function; only its module and name are used."""
    signature: Mapping[str, str]
    """Types of the parameters that are no constexprs: ``"*bf16"``, ``"fp32"``, ``"i32"``, ``"i32:16"`` (divisible)."""
    constexprs: Mapping[str, object]
    """Values of all the others; None for a pointer that is left out."""
    num_warps: int = 4
    num_stages: int = 3
    max_stack: int = 0
    """Bytes per thread that may spill to local memory; above 0 with a reason beside it."""
    wgmma: bool = False
    """Whether Hopper's matrix instructions have to be in it."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiled kernel takes; registers, stack and local memory are per thread."""

    shared: int
    registers: int
    stack: int
    local: int
    ptx: str = field(repr=False)

    @property
    def wgmma(self) -> bool:
        """Whether it uses Hopper's matrix instructions."""
        return "wgmma.mma_async" in self.ptx


class Compiler:
    """The second process; a context manager that ends it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TRITON_INTERPRET": "0"},
        )

    def __enter__(self) -> Compiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)

    def compile(self, build: Build) -> Compiled:
        """Compile for sm_90.

        Raises:
            RuntimeError: The compiler refused the kernel; its words are the message.
        """
        function = build.kernel.fn if hasattr(build.kernel, "fn") else build.kernel
        while hasattr(function, "fn"):
            function = function.fn
        options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
        job = (function.__module__, function.__name__, dict(build.signature), dict(build.constexprs), options)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump(job, self._process.stdin)
        self._process.stdin.flush()
        answer = pickle.load(self._process.stdout)
        if not isinstance(answer, str):
            return Compiled(*answer)
        raise RuntimeError(f"{build.name}: {answer}")

    def check(self, build: Build) -> Compiled:
        """Compile and assert that the result fits a multiprocessor and does not spill."""
        compiled = self.compile(build)
        assert compiled.shared <= SHARED_MAX, (
            f"{build.name}: {compiled.shared} bytes of shared memory, {SHARED_MAX} fit"
        )
        spilled = compiled.stack + compiled.local
        assert spilled <= build.max_stack, f"{build.name}: {spilled} bytes per thread spilled, {compiled}"
        assert compiled.wgmma or not build.wgmma, f"{build.name}: no wgmma in it"
        return compiled


def compile_sm90(
    kernel: object,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Compiled:
    """Compile one kernel and assert that its shared memory fits; a :class:`Compiler` is quicker for several."""
    build = Build(
        name=getattr(kernel, "__name__", "kernel"),
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=num_stages,
        max_stack=sys.maxsize,
    )
    with Compiler() as compiler:
        return compiler.check(build)


def _serve(jobs: IO[bytes], answers: IO[bytes]) -> None:
    """Answer jobs until the input ends."""
    while True:
        try:
            job = pickle.load(jobs)
        except EOFError:
            return
        try:
            answer: object = _compile(*job)
        except Exception as error:  # noqa: BLE001  the asking process raises it
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


def _compile(
    module: str,
    name: str,
    types: dict[str, str],
    constexprs: dict[str, object],
    options: dict[str, int],
) -> tuple[int, int, int, int, str]:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(module), name)
    while not hasattr(kernel, "arg_names") or not hasattr(kernel, "cache_key"):
        kernel = kernel.fn
    arguments = cast("list[str]", kernel.arg_names)
    if {*types, *constexprs} != set(arguments) or set(types) & set(constexprs):
        missing = set(arguments) - {*types, *constexprs}
        unknown = {*types, *constexprs} - set(arguments)
        raise ValueError(f"signature: missing {sorted(missing)}, unknown {sorted(unknown)}, or named twice")
    signature = {name: types[name].partition(":")[0] if name in types else "constexpr" for name in arguments}
    aligned = {name for name, kind in types.items() if kind.startswith("*") or kind.endswith(":16")}
    attrs = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(arguments) if name in aligned}
    source = ASTSource(kernel, signature, {(arguments.index(name),): v for name, v in constexprs.items()}, attrs)
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return (compiled.metadata.shared, *_resources(compiled.asm["cubin"]), compiled.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack and local memory, as the driver will see them."""
    import tempfile
    from pathlib import Path

    from triton.backends import nvidia

    tool = Path(next(iter(nvidia.__path__))) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"], found["LOCAL"]


if __name__ == "__main__":
    # What triton prints must not reach the pipe.
    _answers, sys.stdout = sys.stdout.buffer, sys.stderr
    _serve(sys.stdin.buffer, _answers)
