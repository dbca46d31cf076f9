"""The shared memory pool and its receivers: across real processes where it matters, else in one."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import threading
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from danaus.runtime.messages.segments import (
    ALIGNMENT_BYTES,
    MIN_SEGMENT_BYTES,
    SegmentCache,
    SegmentPool,
    SegmentRef,
    segments_available,
    segments_unavailable_reason,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

pytestmark = pytest.mark.skipif(not segments_available(), reason=str(segments_unavailable_reason()))

# Opens each ref that it is sent, and answers with what it read and with the leases that came back after that.
RECEIVER = """
import collections, json, sys
from danaus.runtime.messages.segments import SegmentCache, SegmentRef
released = collections.deque()
cache = SegmentCache(released.append)
for line in sys.stdin:
    views = cache.open(SegmentRef.unpack(json.loads(line)))
    read = [bytes(view).hex() for view in views]
    held = len(released)
    del views
    print(json.dumps({"read": read, "held": held, "released": [ref.lease_id for ref in released]}), flush=True)
    released.clear()
"""

# Sends one ref and waits for its end.
SENDER = """
import json, sys
from danaus.runtime.messages.segments import SegmentPool
print(json.dumps(SegmentPool(max_bytes=1 << 20).copy_in([b"last words"], holders=["x"]).pack()), flush=True)
sys.stdin.read()
"""

# A child forked while a lease is held: neither end may act for its parent.
FORK = """
import collections, os
from danaus.runtime.messages.segments import SegmentCache, SegmentPool
pool, released = SegmentPool(max_bytes=1 << 30), collections.deque()
cache = SegmentCache(released.append)
ref = pool.copy_in([b"parent"], holders=["x"])
(view,) = cache.open(ref)
child = os.fork()
if child == 0:
    assert bytes(view) == b"parent"
    del view
    assert not released
    assert pool.stats().segments == 0 and cache.stats().mappings == 0
    assert not pool.release(ref.lease_id, "x")
    mine = pool.copy_in([b"child"], holders=["x"])
    assert mine.inode != ref.inode and mine.pid == os.getpid()
    assert bytes(cache.open(mine)[0]) == b"child" and len(released) == 1
    pool.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert bytes(view) == b"parent" and not released
del view
assert [r.lease_id for r in released] == [ref.lease_id]
assert pool.release(ref.lease_id, "x")
"""


@contextmanager
def receiver() -> Generator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", RECEIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen[str], ref: SegmentRef) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(ref.pack()) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def num_mappings_and_descriptors() -> tuple[int, int]:
    maps = Path("/proc/self/maps").read_text()
    return len(re.findall("memfd:danaus", maps)), len(os.listdir("/proc/self/fd"))


@pytest.fixture
def pool() -> Iterator[SegmentPool]:
    made = SegmentPool(max_bytes=1 << 30)
    yield made
    made.close()


def copied(pool: SegmentPool, *views: object, holders: list[str] | None = None) -> SegmentRef:
    ref = pool.copy_in(views, holders=holders or ["receiver"])
    assert ref is not None
    return ref


def test_buffers_arrive_in_another_process_and_the_lease_returns_once(pool: SegmentPool) -> None:
    with receiver() as process:
        ref = copied(pool, b"abc", bytearray(b""), memoryview(b"de"))
        answer = ask(process, ref)

        assert [bytes.fromhex(text) for text in answer["read"]] == [b"abc", b"", b"de"]
        assert answer["held"] == 0
        assert answer["released"] == [ref.lease_id]
        assert pool.release(ref.lease_id, "receiver")
        assert not pool.release(ref.lease_id, "receiver")


def test_a_reused_segment_shows_the_new_bytes_through_the_old_mapping(pool: SegmentPool) -> None:
    with receiver() as process:
        first = copied(pool, b"first")
        ask(process, first)
        pool.release(first.lease_id, "receiver")

        second = copied(pool, b"other")

        assert second.inode == first.inode
        assert bytes.fromhex(ask(process, second)["read"][0]) == b"other"
        assert pool.stats().reused == 1


def test_a_segment_trimmed_by_its_sender_is_not_confused_with_the_next(pool: SegmentPool) -> None:
    with receiver() as process:
        first = copied(pool, b"first")
        ask(process, first)
        pool.release(first.lease_id, "receiver")
        pool.trim(now_s=0.0)
        assert pool.trim(now_s=1000.0) == MIN_SEGMENT_BYTES

        assert bytes.fromhex(ask(process, copied(pool, b"other"))["read"][0]) == b"other"


def test_views_survive_the_death_of_the_sender() -> None:
    released: deque[SegmentRef] = deque()
    cache = SegmentCache(released.append)
    process = subprocess.Popen([sys.executable, "-c", SENDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ref = SegmentRef.unpack(json.loads(process.stdout.readline()))
        (view,) = cache.open(ref)
    finally:
        process.kill()
        process.communicate()

    assert cache.forget(ref.pid) == 1
    assert bytes(view) == b"last words"
    with pytest.raises(OSError, match=str(ref.pid)):
        cache.open(ref)


def test_the_lease_lasts_as_long_as_the_last_array_on_a_view(pool: SegmentPool) -> None:
    numpy = pytest.importorskip("numpy")
    released: deque[SegmentRef] = deque()
    cache = SegmentCache(released.append)
    ref = copied(pool, numpy.arange(10.0), b"x")

    views = cache.open(ref)
    array = numpy.frombuffer(views[0], dtype=numpy.float64)[3:5]
    del views
    gc.collect()

    assert array.tolist() == [3.0, 4.0]
    assert not released
    del array
    assert list(released) == [ref]


def test_a_lease_caught_in_a_cycle_returns_when_the_collector_runs(pool: SegmentPool) -> None:
    released: deque[SegmentRef] = deque()
    cycle: list[object] = list(SegmentCache(released.append).open(copied(pool, b"x")))
    cycle.append(cycle)

    del cycle
    gc.collect()

    assert len(released) == 1


def test_views_cannot_be_written(pool: SegmentPool) -> None:
    numpy = pytest.importorskip("numpy")
    (view,) = SegmentCache(lambda _: None).open(copied(pool, b"abc"))

    assert view.readonly
    assert not numpy.frombuffer(view, dtype="u1").flags.writeable
    with pytest.raises(TypeError):
        view[0] = 1


def test_opening_a_ref_twice_returns_its_lease_twice(pool: SegmentPool) -> None:
    released: deque[SegmentRef] = deque()
    cache = SegmentCache(released.append)
    ref = copied(pool, b"x", holders=["proc", "proc"])

    first, second = cache.open(ref), cache.open(ref)
    del first
    assert len(released) == 1
    del second
    assert len(released) == 2

    assert pool.release(ref.lease_id, "proc")
    assert pool.stats().leases == 1
    assert pool.release(ref.lease_id, "proc")
    assert pool.stats().leases == 0


def test_a_cast_holds_its_segment_until_every_holder_has_released(pool: SegmentPool) -> None:
    ref = copied(pool, b"x", holders=["a", "b", "c"])

    assert pool.release(ref.lease_id, "a")
    assert not pool.release(ref.lease_id, "a")
    assert not pool.release(ref.lease_id, "stranger")
    assert pool.release(ref.lease_id, "c")
    assert pool.stats().free_segments == 0
    assert pool.release(ref.lease_id, "b")
    assert pool.stats().free_segments == 1


def test_a_dead_holder_releases_all_that_it_held_and_nothing_else(pool: SegmentPool) -> None:
    alone, shared, other = (copied(pool, b"x", holders=h) for h in (["dead", "dead"], ["dead", "alive"], ["alive"]))

    assert pool.release_holder("dead") == 2
    assert pool.release_holder("dead") == 0

    assert pool.stats().leases == 2
    assert not pool.release(alone.lease_id, "dead")
    assert pool.release(shared.lease_id, "alive")
    assert pool.release(other.lease_id, "alive")
    assert pool.stats().leases == 0


def test_a_full_pool_refuses_and_takes_up_again_after_a_release() -> None:
    pool = SegmentPool(max_bytes=2 * MIN_SEGMENT_BYTES)
    first = copied(pool, bytes(MIN_SEGMENT_BYTES))
    copied(pool, bytes(MIN_SEGMENT_BYTES))

    assert pool.copy_in([b"x"], holders=["y"]) is None
    assert pool.stats().refused == 1
    pool.release(first.lease_id, "receiver")
    assert pool.copy_in([b"x"], holders=["y"]) is not None
    assert pool.stats().total_bytes <= pool.stats().max_bytes
    pool.close()


def test_free_segments_make_room_for_a_larger_one() -> None:
    pool = SegmentPool(max_bytes=4 * MIN_SEGMENT_BYTES)
    for ref in [copied(pool, b"x") for _ in range(4)]:
        pool.release(ref.lease_id, "receiver")
    assert pool.stats().free_segments == 4

    assert pool.copy_in([bytes(3 * MIN_SEGMENT_BYTES)], holders=["y"]) is not None
    assert pool.copy_in([bytes(5 * MIN_SEGMENT_BYTES)], holders=["y"]) is None
    assert pool.stats().segments == 2
    pool.close()


def test_the_number_of_segments_is_bounded() -> None:
    pool = SegmentPool(max_bytes=1 << 30, max_segments=2)
    copied(pool, b"x")
    copied(pool, b"x")

    assert pool.copy_in([b"x"], holders=["y"]) is None
    pool.close()


def test_a_copy_takes_the_smallest_free_segment_that_fits_and_no_giant(pool: SegmentPool) -> None:
    sizes = [MIN_SEGMENT_BYTES * factor for factor in (1, 2, 64)]
    refs = [copied(pool, bytes(size)) for size in sizes]
    for ref in refs:
        pool.release(ref.lease_id, "receiver")

    assert copied(pool, bytes(MIN_SEGMENT_BYTES + 1)).inode == refs[1].inode
    assert copied(pool, bytes(MIN_SEGMENT_BYTES + 1)).inode != refs[2].inode


def test_trim_keeps_a_little_for_long_and_much_only_for_a_short_time() -> None:
    pool = SegmentPool(max_bytes=1 << 30, keep_bytes=MIN_SEGMENT_BYTES, idle_s=5.0, keep_s=60.0)
    refs = [copied(pool, b"x") for _ in range(3)]
    held = copied(pool, b"held")
    for ref in refs:
        pool.release(ref.lease_id, "receiver")

    assert pool.trim(now_s=100.0) == 0
    assert pool.trim(now_s=104.9) == 0
    assert pool.trim(now_s=105.0) == 2 * MIN_SEGMENT_BYTES
    assert pool.trim(now_s=159.9) == 0
    assert pool.trim(now_s=160.0) == MIN_SEGMENT_BYTES
    assert pool.trim(now_s=9999.0) == 0
    assert pool.release(held.lease_id, "receiver")
    pool.close()


def test_buffers_start_aligned(pool: SegmentPool) -> None:
    ref = copied(pool, b"x", b"", b"y" * 65, b"z")

    assert [offset % ALIGNMENT_BYTES for offset, _ in ref.extents] == [0, 0, 0, 0]
    assert [bytes(view) for view in SegmentCache(lambda _: None).open(ref)] == [b"x", b"", b"y" * 65, b"z"]


@pytest.mark.parametrize("size", [0, 1, MIN_SEGMENT_BYTES, MIN_SEGMENT_BYTES + 1, (1 << 20) - 1, (3 << 20) + 7])
@pytest.mark.parametrize("make", [bytearray, bytes], ids=["writable", "read-only"])
def test_any_size_arrives_whole(pool: SegmentPool, size: int, make: type[bytes]) -> None:
    data = make(os.urandom(size))

    (view,) = SegmentCache(lambda _: None).open(copied(pool, data))

    assert view == data
    assert pool.stats().total_bytes <= max(MIN_SEGMENT_BYTES, 1.25 * size)


def test_shaped_buffers_are_copied_as_bytes_and_strided_ones_refused(pool: SegmentPool) -> None:
    numpy = pytest.importorskip("numpy")
    matrix = numpy.arange(6, dtype=numpy.int32).reshape(2, 3)

    (view, empty) = SegmentCache(lambda _: None).open(copied(pool, matrix, numpy.empty((0, 3))))

    assert bytes(view) == matrix.tobytes()
    assert len(empty) == 0
    with pytest.raises(TypeError, match="not C-contiguous"):
        pool.copy_in([matrix[:, 1:]], holders=["x"])
    assert pool.stats().leases == 1


def test_holders_must_be_a_list_of_names(pool: SegmentPool) -> None:
    with pytest.raises(ValueError, match="at least one holder"):
        pool.copy_in([b"x"], holders=[])
    with pytest.raises(TypeError, match="one string"):
        pool.copy_in([b"x"], holders="proc")


def test_a_ref_that_is_not_the_senders_is_refused(pool: SegmentPool) -> None:
    released: deque[SegmentRef] = deque()
    cache, ref = SegmentCache(released.append), copied(pool, b"x")
    wrong_inode = SegmentRef(ref.pid, ref.fd, ref.inode + 1, 7, ref.segment_bytes, 1, ())
    wrong_size = SegmentRef(ref.pid, ref.fd, ref.inode, 7, ref.segment_bytes * 2, 1, ())

    for wrong in (wrong_inode, wrong_size):
        with pytest.raises(OSError, match="pid namespace"):
            cache.open(wrong)
    assert not released
    assert cache.stats().mappings == 0


def test_refs_survive_packing_and_malformed_ones_are_refused(pool: SegmentPool) -> None:
    ref = copied(pool, b"abc", b"d")

    assert SegmentRef.unpack(json.loads(json.dumps(ref.pack()))) == ref
    for packed in ([], [1, 2], [*ref.pack()[:-1], 5], [*ref.pack()[:-1], [[0]]]):
        with pytest.raises(ValueError, match="not a packed SegmentRef"):
            SegmentRef.unpack(packed)
    for extent in ([0, ref.segment_bytes + 1], [-1, 1], [0, -1]):
        with pytest.raises(ValueError, match="outside its segment"):
            SegmentRef.unpack([*ref.pack()[:-1], [extent]])


def test_close_leaves_no_mapping_and_no_descriptor() -> None:
    before = num_mappings_and_descriptors()
    pool, cache = SegmentPool(max_bytes=1 << 30), SegmentCache(lambda _: None)
    held = cache.open(copied(pool, b"held"))
    pool.release(copied(pool, bytes(1 << 20)).lease_id, "receiver")
    assert num_mappings_and_descriptors() == (before[0] + 3, before[1] + 2)

    pool.close()
    cache.close()
    pool.close()

    assert bytes(held[0]) == b"held"
    assert pool.copy_in([b"x"], holders=["y"]) is None
    del held
    assert num_mappings_and_descriptors() == before


def test_the_cache_forgets_the_least_recently_used_mapping_beyond_its_bound(pool: SegmentPool) -> None:
    cache = SegmentCache(lambda _: None, max_mappings=2)
    refs = [copied(pool, bytes([n])) for n in range(3)]

    views = [cache.open(ref)[0] for ref in refs]

    assert cache.stats().mappings == 2
    assert [bytes(view) for view in views] == [b"\0", b"\1", b"\2"]


def test_a_pool_that_runs_out_of_descriptors_refuses_instead_of_failing(
    pool: SegmentPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptors(_name: str, _flags: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", no_descriptors)

    assert pool.copy_in([b"x"], holders=["y"]) is None
    assert pool.stats().refused == 1


def test_threads_that_share_a_pool_and_a_cache_never_see_each_others_bytes(pool: SegmentPool) -> None:
    released: deque[SegmentRef] = deque()
    cache, wrong = SegmentCache(released.append), deque[int]()

    def work(number: int) -> None:
        for _ in range(50):
            ref = copied(pool, bytes([number]) * 100_000, holders=[str(number)])
            (view,) = cache.open(ref)
            if bytes(view) != bytes([number]) * 100_000:
                wrong.append(number)
            del view
            pool.release(ref.lease_id, str(number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong
    assert len(released) == 200
    assert pool.stats().leases == 0


def test_a_segment_is_not_reused_while_a_copy_into_it_runs_though_its_holder_has_died(
    pool: SegmentPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases_while_copying = list[int]()

    def holder_dies(_to: int, _from: int, _length: int) -> None:
        assert pool.release_holder("dead") == 1
        leases_while_copying.append(pool.stats().leases)

    monkeypatch.setattr("ctypes.memmove", holder_dies)
    copied(pool, bytearray(1 << 20), holders=["dead"])

    assert leases_while_copying == [1]
    assert pool.stats().leases == 0


def test_a_forked_child_starts_empty_and_returns_no_lease_of_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, check=False, timeout=15)

    assert done.returncode == 0, done.stderr
