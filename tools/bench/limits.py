"""Measures what the machine allows without the runtime: raw ZeroMQ, copies, forks, imports, deaths.

Imports nothing of danaus, so that the column which the runtime is compared with can be read and run by itself. The
file is also the other process of each limit (``python limits.py ROLE ...``, the functions at the end), which lives as
long as its :class:`Child` in the parent and no longer. Every wait ends after ``WAIT_S``. Times are seconds, memory MiB.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import mmap
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

WAIT_S: Final = 60.0
SWITCH_INTERVAL_S: Final = 0.0005
SMALL: Final = b"x" * 64
_MIB: Final = 1 << 20
_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)
_now = time.perf_counter
# What is read at import time: a process that is to fork must have one thread only.
_ONE_THREAD: Final = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Child:
    """This file, run as another process: ends when closed, or when this process ends."""

    def __init__(self, role: str, *args: object, pass_fds: Sequence[int] = ()) -> None:
        command = [sys.executable, __file__, role, *map(str, args)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=tuple(pass_fds),
            env={**os.environ, **_ONE_THREAD},
            bufsize=0,
        )
        self.pid = self._process.pid

    def ask(self, line: str) -> str:
        """Send a line and return the line that answers it."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        return self.read_line()

    def read_line(self) -> str:
        """Return the next line of output."""
        assert self._process.stdout is not None
        wait_readable(self._process.stdout.fileno(), f"{self._process.args} printed nothing")
        return self._process.stdout.readline().decode().strip()

    def wait_ended(self) -> None:
        """Wait until the process has ended by itself."""
        self._process.wait(WAIT_S)

    def close(self) -> None:
        """End the process and reap it."""
        self._process.kill()
        self._process.communicate(timeout=WAIT_S)


class Wires:
    """ZeroMQ sockets in a private directory; no operation on them waits for ever."""

    def __init__(self) -> None:
        zmq = _zmq()
        self.directory = tempfile.mkdtemp(prefix="limits-")
        self._context = zmq.Context()

    def address(self, name: object) -> str:
        """Return the address that :meth:`bind` uses for ``name``."""
        return f"ipc://{self.directory}/{name}"

    def bind(self, kind: str, name: object) -> Any:
        """Return a bound socket of the named kind."""
        zmq = _zmq()
        socket = self._context.socket(getattr(zmq, kind))
        socket.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
        socket.setsockopt(zmq.SNDTIMEO, int(WAIT_S * 1000))
        socket.set_hwm(0)
        socket.bind(self.address(name))
        return socket

    def close(self) -> None:
        """Close all sockets and remove the directory."""
        self._context.destroy(linger=0)
        shutil.rmtree(self.directory, ignore_errors=True)


class PingPong:
    """Raw PAIR over ipc: 64 bytes to another process and back. ``busy``: a Python thread there never rests."""

    def __init__(self, *, busy: bool = False) -> None:
        self._wires = Wires()
        self._socket = self._wires.bind("PAIR", "pair")
        self._child = Child("echo", self._wires.address("pair"), *(["busy"] if busy else []))
        self.pid = self._child.pid
        self._socket.recv()

    def times(self, count: int, *, pause_s: float = 0.0) -> list[float]:
        """Return the seconds of each of ``count`` round trips, with a rest before each."""
        return paced_times(self._round_trip, count, pause_s=pause_s)

    def _round_trip(self) -> None:
        self._socket.send(SMALL)
        self._socket.recv()

    def close(self) -> None:
        """End the other process."""
        self._child.close()
        self._wires.close()


class Calls:
    """A DEALER pair over ipc; name, arguments and number pickled each way; all sent before the first reply is read."""

    def __init__(self) -> None:
        self._wires = Wires()
        self._socket = self._wires.bind("DEALER", "dealer")
        self._child = Child("calls", self._wires.address("dealer"))
        self._socket.recv()

    def rate(self, count: int) -> float:
        """Return calls per second, ``count`` in flight."""
        send, receive, dumps, loads = self._socket.send, self._socket.recv, pickle.dumps, pickle.loads
        start = _now()
        for number in range(count):
            send(dumps(("noop", (), number)))
        for _ in range(count):
            loads(receive())
        return count / (_now() - start)

    def close(self) -> None:
        """End the other process."""
        self._child.close()
        self._wires.close()


class Drain:
    """PUSH to PULL over ipc, 100 bytes a message, one acknowledgement at the end."""

    def __init__(self) -> None:
        self._wires = Wires()
        self._push = self._wires.bind("PUSH", "push")
        self._done = self._wires.bind("PULL", "done")
        self._child = Child("drain", self._wires.address("push"), self._wires.address("done"))
        self._done.recv()

    def rate(self, count: int) -> float:
        """Return messages per second."""
        message = b"x" * 100
        start = _now()
        for _ in range(count):
            self._push.send(message)
        self._push.send(b"")
        if int(self._done.recv()) != count:
            raise RuntimeError("PUSH/PULL lost messages")
        return count / (_now() - start)

    def close(self) -> None:
        """End the other process."""
        self._child.close()
        self._wires.close()


class Nursery:
    """A process that imports ``modules`` once and then forks children on request."""

    def __init__(self, *modules: str) -> None:
        self._wires = Wires()
        self._child = Child("nursery", *modules)
        self._child.read_line()
        self._sockets: list[Any] = []
        self._rounds = 0
        self.pids: list[int] = []

    def fork_workers(self, count: int) -> None:
        """Fork ``count`` children that answer over ZeroMQ, and hear from each."""
        self._rounds += 1
        names = [f"{self._rounds}-{number}" for number in range(count)]
        self._sockets = [self._wires.bind("DEALER", name) for name in names]
        self.pids = [
            int(pid) for pid in self._child.ask(f"fork {count} {self._wires.address(self._rounds)}").split()[1:]
        ]
        for socket in self._sockets:
            socket.recv()

    def calls(self, count: int) -> list[float]:
        """Return the seconds of each of ``count`` rounds: one message to every worker, then one from each."""
        return [_timed(self._scatter_gather) for _ in range(count)]

    def _scatter_gather(self) -> None:
        for socket in self._sockets:
            socket.send(SMALL)
        for socket in self._sockets:
            socket.recv()

    def stop_workers(self) -> float:
        """Tell the workers to end; return the seconds until all have been reaped."""
        start = _now()
        for socket in self._sockets:
            socket.send(b"stop")
        self._child.ask("reap")
        elapsed = _now() - start
        for socket in self._sockets:
            socket.close(linger=0)
        self._sockets, self.pids = [], []
        return elapsed

    def memory(self) -> list[tuple[float, float]]:
        """Return PSS and USS of each worker."""
        return [memory_of(pid) for pid in self.pids]

    def fork_time(self, count: int) -> float:
        """Return the seconds from the first fork to a byte from each of ``count`` children."""
        seconds = float(self._child.ask(f"fork {count}").split()[0])
        self._child.ask("kill")
        return seconds

    def kill_time(self) -> float:
        """Return the seconds from SIGKILL to a forked child until its pidfd is readable."""
        pid = int(self._child.ask("fork 1").split()[1])
        pidfd = os.pidfd_open(pid)
        try:
            killed_at = kill_soon(pid)
            wait_readable(pidfd, f"process {pid} outlived SIGKILL")
            elapsed = _now() - killed_at()
        finally:
            os.close(pidfd)
        self._child.ask("kill")
        return elapsed

    def close(self) -> None:
        """End the nursery and what it forked."""
        self._child.close()
        self._wires.close()


class Segment:
    """A shared segment that both sides keep mapped: copy in, tell, (read,) hear."""

    def __init__(self, size_bytes: int) -> None:
        self._source = memoryview(bytearray(b"\1") * size_bytes)
        self._fd = os.memfd_create("limits")
        os.ftruncate(self._fd, size_bytes)
        self._memory = memoryview(mmap.mmap(self._fd, size_bytes))
        self._wires = Wires()
        self._socket = self._wires.bind("PAIR", "segment")
        self._child = Child("segment", self._wires.address("segment"), self._fd, size_bytes, pass_fds=[self._fd])
        self._socket.recv()

    def times(self, count: int, *, copy_out: bool = False) -> list[float]:
        """Return the seconds of each of ``count`` handovers; ``copy_out`` copies to warm memory on the other side."""
        request = b"copy" if copy_out else b"look"
        return [_timed(lambda: self._handover(request)) for _ in range(count)]

    def _handover(self, request: bytes) -> None:
        self._memory[:] = self._source
        self._socket.send(request)
        self._socket.recv()

    def close(self) -> None:
        """End the other process."""
        self._child.close()
        self._wires.close()
        os.close(self._fd)


def copy_times(size_bytes: int, count: int) -> list[float]:
    """Return the seconds of each of ``count`` copies from warm memory to warm memory."""
    source, target = (memoryview(bytearray(byte) * size_bytes) for byte in (b"\1", b"\2"))

    def copy() -> None:
        target[:] = source

    return [_timed(copy) for _ in range(count)]


class _Span(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def foreign_read_times(size_bytes: int, count: int) -> list[float]:
    """Return the seconds of each of ``count`` reads of another process's warm memory by ``process_vm_readv``."""
    child = Child("hold", size_bytes)
    try:
        remote = _Span(int(child.read_line()), size_bytes)
        target = (ctypes.c_char * size_bytes).from_buffer(bytearray(b"\1") * size_bytes)
        local = _Span(ctypes.addressof(target), size_bytes)

        def read() -> None:
            done = 0
            while done < size_bytes:
                ours = _Span((local.base or 0) + done, size_bytes - done)
                theirs = _Span((remote.base or 0) + done, size_bytes - done)
                got = _libc.process_vm_readv(child.pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
                if got <= 0:
                    raise OSError(ctypes.get_errno(), "process_vm_readv failed")
                done += got

        return [_timed(read) for _ in range(count)]
    finally:
        child.close()


def import_time(*modules: str) -> float:
    """Return the seconds that a fresh interpreter takes to import ``modules``."""
    source = (
        f"import time\nstart = time.perf_counter()\nimport {', '.join(modules)}\nprint(time.perf_counter() - start)"
    )
    return float(_run(source))


def imported_memory(*modules: str) -> tuple[float, float]:
    """Return PSS and USS of a fresh interpreter that has imported ``modules``."""
    path = os.path.dirname(os.path.abspath(__file__))
    source = f"import os, sys\nimport {', '.join(modules)}\nsys.path.append({path!r})\nimport limits\n"
    pss, uss = _run(source + "print(*limits.memory_of(os.getpid()))").split()
    return float(pss), float(uss)


def start_time(count: int, *modules: str) -> float:
    """Return the seconds from starting a script until ``count`` ZeroMQ workers that it forked have each replied.

    The plain way to write it: workers connect before the script has bound, and lose one reconnect interval (0.1 s).
    """
    start = time.monotonic()
    child = Child("start", count, *modules)
    try:
        replied_at = float(child.read_line())
        child.wait_ended()
        return replied_at - start
    finally:
        child.close()


def memory_of(pid: int) -> tuple[float, float]:
    """Return PSS and USS (what would be freed if the process ended) of a process."""
    fields: dict[str, int] = {}
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        for line in rollup.readlines()[1:]:
            name, kib = line.split()[:2]
            fields[name.rstrip(":")] = int(kib)
    return fields["Pss"] / 1024, (fields["Private_Clean"] + fields["Private_Dirty"]) / 1024


def kill_soon(pid: int, after_s: float = 0.02) -> Callable[[], float]:
    """Kill ``pid`` a little later, from another thread; returns a function that says when (``time.perf_counter``)."""
    killed: list[float] = []

    def kill() -> None:
        killed.append(_now())
        os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(after_s, kill)
    timer.start()

    def when() -> float:
        timer.join(WAIT_S)
        return killed[0]

    return when


def wait_readable(fd: int, what_if_not: str) -> None:
    """Wait until ``fd`` is readable.

    Raises:
        TimeoutError: It was not within ``WAIT_S``.
    """
    poller = select.poll()
    poller.register(fd, select.POLLIN | select.POLLHUP)
    if not poller.poll(WAIT_S * 1000):
        raise TimeoutError(f"{what_if_not} in {WAIT_S:g} s")


def paced_times(work: Callable[[], object], count: int, *, pause_s: float) -> list[float]:
    """Return the seconds of each of ``count`` repetitions, with a rest before each."""
    times: list[float] = []
    for _ in range(count):
        if pause_s:
            time.sleep(pause_s)
        times.append(_timed(work))
    return times


def _timed(work: Callable[[], object]) -> float:
    start = _now()
    work()
    return _now() - start


def _run(source: str) -> str:
    environment = {**os.environ, **_ONE_THREAD}
    command = [sys.executable, "-c", source]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=True, env=environment).stdout


def _zmq() -> Any:
    return importlib.import_module("zmq")


# From here on: the other process. Its first act is to tie its life to its parent's.


def _die_with_parent() -> None:
    parent = os.getppid()
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent or parent == 1:
        os._exit(1)


def _connect(kind: str, address: str) -> Any:
    zmq = _zmq()
    socket = zmq.Context.instance().socket(getattr(zmq, kind))
    socket.set_hwm(0)
    socket.connect(address)
    return socket


def _echo(address: str, mode: str = "") -> None:
    socket = _connect("PAIR", address)
    if mode == "busy":
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        threading.Thread(target=_spin, daemon=True).start()
    _serve_echo(socket)


def _spin() -> None:
    while True:
        pass


def _serve_echo(socket: Any) -> None:
    socket.send(b"up")
    while (message := socket.recv()) != b"stop":
        socket.send(message)


def _calls(address: str) -> None:
    socket = _connect("DEALER", address)
    socket.send(b"up")
    while True:
        # Bytes of the parent process, over a socket in a directory that only this user can enter.
        _name, _args, number = pickle.loads(socket.recv())  # noqa: S301
        socket.send(pickle.dumps((number, None)))


def _drain(address: str, done: str) -> None:
    pull, answer = _connect("PULL", address), _connect("PUSH", done)
    answer.send(b"up")
    while True:
        count = 0
        while pull.recv():
            count += 1
        answer.send(b"%d" % count)


def _segment(address: str, fd: str, size: str) -> None:
    memory = memoryview(mmap.mmap(int(fd), int(size)))
    warm = memoryview(bytearray(b"\1") * int(size))
    warm[:] = memory
    socket = _connect("PAIR", address)
    socket.send(b"up")
    while True:
        request = socket.recv()
        if request == b"copy":
            warm[:] = memory
        socket.send(request)


def _hold(size: str) -> None:
    memory = (ctypes.c_char * int(size)).from_buffer(bytearray(b"\1") * int(size))
    print(ctypes.addressof(memory), flush=True)
    signal.pause()


def _nursery(*modules: str) -> None:
    for name in ("zmq", *modules):
        importlib.import_module(name)
    pids: list[int] = []
    print("ready", flush=True)
    for line in sys.stdin:
        verb, *rest = line.split()
        if verb == "fork":
            start = _now()
            forked = _fork(int(rest[0]), *rest[1:])
            print(_now() - start, *forked, flush=True)
            pids += forked
            continue
        if verb == "kill":
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        pids.clear()
        print("reaped", flush=True)


def _fork(count: int, address: str = "") -> list[int]:
    """Fork children and hear a byte from each; with an address they then answer over ZeroMQ at it."""
    ours, theirs = os.pipe()
    pids: list[int] = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            _run_forked(theirs, f"{address}-{number}" if address else "")
        pids.append(pid)
    heard = 0
    while heard < count:
        heard += len(os.read(ours, count))
    os.close(ours)
    os.close(theirs)
    return pids


def _run_forked(ready: int, address: str) -> None:
    try:
        _die_with_parent()
        os.write(ready, b"1")
        if address:
            _serve_echo(_connect("DEALER", address))
        else:
            signal.pause()
    finally:
        os._exit(0)


def _start(count: str, *modules: str) -> None:
    for name in ("zmq", *modules):
        importlib.import_module(name)
    wires = Wires()
    sockets: list[Any] = []
    pids: list[int] = []
    try:
        # The children first: a context must not be forked. They connect, and ZeroMQ retries until the parent has bound.
        pids = _fork(int(count), wires.address("w"))
        sockets = [wires.bind("DEALER", f"w-{number}") for number in range(int(count))]
        for socket in sockets:
            socket.recv()
            socket.send(SMALL)
        for socket in sockets:
            socket.recv()
        print(time.monotonic(), flush=True)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wires.close()


_ROLES: Final[dict[str, Callable[..., None]]] = {
    "echo": _echo,
    "calls": _calls,
    "drain": _drain,
    "segment": _segment,
    "hold": _hold,
    "nursery": _nursery,
    "start": _start,
}


@contextlib.contextmanager
def closing_all(*limits: Any) -> Generator[None]:
    """Close every given limit at the end, whatever happens."""
    with contextlib.ExitStack() as stack:
        for limit in limits:
            stack.callback(limit.close)
        yield


if __name__ == "__main__":
    _die_with_parent()
    # Ctrl-C reaches the whole group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _ROLES[sys.argv[1]](*sys.argv[2:])
