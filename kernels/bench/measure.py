"""Compares a case's variants on small inputs, then times them on full ones with the GPU's own clock.

Before each call the second level cache is overwritten and the GPU is kept busy for a moment, so that neither warm data
nor the time that Python takes for a launch is measured.
"""

from __future__ import annotations

import gc
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from .rows import OURS, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .case import Case, Prepare

CALLS = 100
CALLS_OF_SLOW = 20
"""Of a call that takes longer than :data:`SLOW_MS`."""
SLOW_MS = 50.0
WARM_UP_MS = 200.0
FLUSH_BYTES = 256 << 20
BUSY_CYCLES = 400_000
"""About 0.2 ms, longer than a launch through torch's dispatcher."""


def measure(case: Case, device: torch.device) -> Row:
    """Check and time every variant; those of others may fail, ours may not."""
    wrong = check(case, device)
    ours = [text for text in wrong if text.startswith(f"{OURS}:")]
    if ours:
        return Row.failed(case, ours[0])
    times_us: dict[str, float] = {}
    absent = dict(text.split(": ", 1) for text in wrong)
    for name, prepare in case.variants.items():
        if name in absent:
            continue
        try:
            times_us[name] = time_us(case, prepare, device)
        except Exception as error:  # a variant of torch may lack the shape, the device or the memory
            if name == OURS:
                raise
            absent[name] = _first_line(error)
        _forget()
    return Row.of(case, times_us, absent)


def check(case: Case, device: torch.device, *, variants: tuple[str, ...] | None = None) -> list[str]:
    """Compare the variants with "reference" on small inputs; return what is wrong, as ``"variant: why"``.

    What torch compiles is left out: that takes long, once more for the small shape, and shows nothing of the kernels.
    """
    names = [name for name in case.variants if name != "reference" and (variants is None or name in variants)]
    names = [name for name in names if "compile" not in name]
    if "reference" not in case.variants:
        return []
    expected = list(_tensors(_run(case, case.variants["reference"], device)))
    found: list[str] = []
    for name in names:
        try:
            got = list(_tensors(_run(case, case.variants[name], device)))
            found.extend(f"{name}: {text}" for text in _differences(got, expected, case.tolerance))
        except Exception as error:  # noqa: BLE001  reported as the variant's result
            found.append(f"{name}: {_first_line(error)}")
    _forget()
    return found


def time_us(case: Case, prepare: Prepare, device: torch.device) -> float:
    """Return the median time of a call at full size."""
    timed = prepare(*case.make(device, False))
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    # The first call compiles.
    timed()
    once_ms = max(_time_ms(timed, flush), 1e-3)
    for _ in range(int(min(max(WARM_UP_MS / once_ms, 3), 100))):
        timed()
    calls = CALLS if once_ms < SLOW_MS else CALLS_OF_SLOW
    return 1e3 * median(_time_ms(timed, flush) for _ in range(calls))


def _time_ms(timed: Callable[[], object], flush: torch.Tensor) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(BUSY_CYCLES)  # noqa: SLF001  torch has no public way to keep a stream busy
    flush.zero_()
    start.record()
    timed()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _run(case: Case, prepare: Prepare, device: torch.device) -> object:
    return prepare(*case.make(device, True))()


def _tensors(result: object) -> Iterator[torch.Tensor]:
    """Every tensor in a result, however nested; None where a part has no result."""
    if isinstance(result, torch.Tensor):
        yield result.detach()
    elif isinstance(result, (list, tuple)):
        parts: Any = result
        for part in parts:
            yield from _tensors(part)


def _differences(got: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> Iterator[str]:
    if len(got) != len(expected):
        yield f"{len(got)} results, expected {len(expected)}"
        return
    for number, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        if mine.shape != theirs.shape:
            yield f"result {number} has shape {tuple(mine.shape)}, expected {tuple(theirs.shape)}"
        elif not mine.dtype.is_floating_point:
            if not torch.equal(mine, theirs.to(mine.dtype)):
                yield f"result {number} differs, and whole numbers have to be equal"
        else:
            norm = theirs.double().norm()
            error = ((mine.double() - theirs.double()).norm() / norm.clamp_min(1e-30)).item()
            if not error <= tolerance:
                yield f"result {number} is off by {error:.2g} of its norm, allowed {tolerance:.2g}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
