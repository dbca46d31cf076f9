"""Which CPUs and memory nodes a proc may use.

``proc_bind`` takes, for each proc of a host, what numactl and taskset take: ``cpunodebind``, ``membind``,
``physcpubind`` and ``cpus``. The lists are resolved before anything starts; :func:`apply_binding` runs in the new proc,
while it has one thread, and needs neither of the two tools.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_KEYS = ("cpunodebind", "physcpubind", "cpus", "membind")
_MPOL_BIND = 2
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}


@dataclass(frozen=True, slots=True)
class Topology:
    """The CPUs that this process may use, by memory node."""

    nodes: dict[int, tuple[int, ...]]
    """Of each node its usable CPUs, those of one core next to each other. A node may have none (memory only)."""

    @property
    def cpus(self) -> tuple[int, ...]:
        """All usable CPUs, node after node."""
        return tuple(cpu for node in sorted(self.nodes) for cpu in self.nodes[node])


@dataclass(frozen=True, slots=True)
class Binding:
    """Where one proc runs, and where its memory comes from; None where that is left to the kernel."""

    cpus: frozenset[int] | None = None
    mem_nodes: frozenset[int] | None = None


def read_topology(root: str | os.PathLike[str] = "/") -> Topology:
    """Read the memory nodes and CPUs that this process's affinity allows. ``root`` is where /sys is looked for."""
    allowed, sys = os.sched_getaffinity(0), Path(root) / "sys/devices/system"
    nodes: dict[int, tuple[int, ...]] = {}
    for path in sys.glob("node/node[0-9]*"):
        cpus = _parse_numbers((path / "cpulist").read_text().strip())
        nodes[int(path.name.removeprefix("node"))] = _core_by_core(cpus & allowed, sys)
    return Topology(nodes or {0: _core_by_core(allowed, sys)})


def resolve_bindings(
    proc_bind: Sequence[Mapping[str, str | int]], *, num_procs: int, topology: Topology
) -> tuple[Binding, ...]:
    """Turn ``proc_bind`` into a binding for each proc of a host.

    Lists read as numactl's and taskset's do: ``0-3,8``, ``0-6:2``, ``all``, ``!0-1`` (all but) and ``+0-1`` (of the
    usable ones). Where several keys choose CPUs, those that all of them choose are meant.

    Raises:
        ValueError: not one dict for each proc, an unknown key, or CPUs and nodes that cannot be used here.
    """
    if len(proc_bind) != num_procs:
        text = f"proc_bind has {len(proc_bind)} entries for {num_procs} procs per host"
        raise ValueError(f"{text}; give one dict for each proc ({{}} leaves a proc free)")
    return tuple(_resolve(number, entry, topology) for number, entry in enumerate(proc_bind))


def partition_cpus(num_procs: int, topology: Topology) -> tuple[frozenset[int], ...]:
    """Share the usable CPUs out evenly, neighbours together; with more procs than CPUs, neighbours share one."""
    if num_procs < 1:
        return ()
    cpus = topology.cpus
    bounds = [number * len(cpus) // num_procs for number in range(num_procs + 1)]
    return tuple(frozenset(cpus[start : max(end, start + 1)]) for start, end in itertools.pairwise(bounds))


def apply_binding(binding: Binding) -> str | None:
    """Bind the calling thread and all that it starts. Call it in the new proc before there is another thread.

    Returns:
        None, or why the memory could not be bound: some containers forbid it, and a proc runs without it.

    Raises:
        OSError: the CPUs cannot be used any more.
    """
    if binding.cpus is not None:
        os.sched_setaffinity(0, binding.cpus)
    return None if binding.mem_nodes is None else _bind_memory(binding.mem_nodes)


def _resolve(number: int, entry: Mapping[str, str | int], topology: Topology) -> Binding:
    unknown = ", ".join(map(repr, sorted(set(entry) - set(_KEYS))))
    if unknown:
        raise ValueError(f"proc_bind[{number}]: unknown key {unknown}; there are {', '.join(_KEYS)}")
    cpus: frozenset[int] | None = None
    for key in ("cpunodebind", "physcpubind", "cpus"):
        if key in entry:
            chosen = _choose_cpus(number, key, str(entry[key]), topology)
            cpus = chosen if cpus is None else cpus & chosen
    if cpus is not None and not cpus:
        raise ValueError(f"proc_bind[{number}]={dict(entry)} leaves no CPU; usable are {_text(topology.cpus)}")
    mem = _choose(number, "membind", str(entry["membind"]), topology.nodes) if "membind" in entry else None
    return Binding(cpus, mem)


def _choose_cpus(number: int, key: str, text: str, topology: Topology) -> frozenset[int]:
    if key != "cpunodebind":
        return _choose(number, key, text, topology.cpus)
    nodes = _choose(number, key, text, topology.nodes)
    return frozenset(cpu for node in nodes for cpu in topology.nodes[node])


def _choose(number: int, key: str, text: str, usable: Iterable[int]) -> frozenset[int]:
    there = sorted(usable)
    where = f"proc_bind[{number}]: {key}={text!r}"
    body = text.strip().lstrip("!+")
    try:
        wanted = frozenset(there) if body == "all" else _parse_numbers(body)
    except ValueError:
        raise ValueError(f"{where} is no list of numbers such as '0-3,8', '0-6:2', 'all', '!0' or '+0-1'") from None
    if text.strip().startswith("+"):
        wanted = frozenset(there[place] if place < len(there) else -1 for place in wanted)
    if not wanted <= set(there):
        raise ValueError(f"{where}: only {_text(there)} can be used here")
    chosen = frozenset(there) - wanted if text.strip().startswith("!") else wanted
    if not chosen:
        raise ValueError(f"{where} chooses nothing; {_text(there)} can be used here")
    return chosen


def _parse_numbers(text: str) -> frozenset[int]:
    """Parse ``0-3,8`` and ``0-6:2``, as the kernel, numactl and taskset write them."""
    numbers = set[int]()
    for part in filter(None, text.split(",")):
        span, _, step = part.partition(":")
        first, dash, last = span.partition("-")
        numbers.update(range(int(first), int(last if dash else first) + 1, int(step or 1)))
    return frozenset(numbers)


def _core_by_core(cpus: Iterable[int], sys: Path) -> tuple[int, ...]:
    def first_sibling(cpu: int) -> int:
        try:
            return min(_parse_numbers((sys / f"cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()))
        except (OSError, ValueError):
            return cpu

    return tuple(sorted(cpus, key=lambda cpu: (first_sibling(cpu), cpu)))


def _bind_memory(nodes: frozenset[int]) -> str | None:
    call = _SET_MEMPOLICY.get(platform.machine())
    if call is None:
        return f"membind: not known how to bind memory on {platform.machine()}"
    width = max(nodes) + 1
    mask = (ctypes.c_ulong * (width // 64 + 1))()
    for node in nodes:
        mask[node // 64] |= 1 << (node % 64)
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel reads one bit less than it is told.
    arguments = (ctypes.c_long(call), ctypes.c_long(_MPOL_BIND), mask, ctypes.c_ulong(width + 1))
    if libc.syscall(*arguments) == 0:
        return None
    return f"membind to nodes {_text(nodes)}: {os.strerror(ctypes.get_errno())}"


def _text(numbers: Iterable[int]) -> str:
    return ",".join(map(str, sorted(numbers))) or "none"
