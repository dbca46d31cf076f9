"""Faults on purpose: kill, stop, exit, raise, hang, slow, at a rank and a moment of your choice.

    from danaus import testing

    with testing.inject(trainers, testing.Fault.kill(rank=3, endpoint="step", nth=5)) as faults:
        ...
    assert faults.fired

The tests of this package use it, and yours may. Code names further moments with ``testing.point("forward", step=12)``.
``testing.kill(mesh, rank)``, ``stop`` and ``resume`` act at once, and ``testing.Chaos(seed, ...)`` draws random faults
that the seed determines.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from ..lazy import late as _late

if _TYPE_CHECKING:
    from .armed import point
    from .chaos import Chaos, InjectedError
    from .faults import Fault, FaultKind, Where
    from .injecting import Fired, Injection, inject
    from .signals import kill, resume, stop

# Every process looks at `armed`; what makes faults is for those who do.
__getattr__ = _late(
    __name__,
    {
        "Chaos": ".chaos",
        "Fault": ".faults",
        "FaultKind": ".faults",
        "Fired": ".injecting",
        "InjectedError": ".chaos",
        "Injection": ".injecting",
        "Where": ".faults",
        "inject": ".injecting",
        "kill": ".signals",
        "point": ".armed",
        "resume": ".signals",
        "stop": ".signals",
    },
)

__all__ = [
    "Chaos",
    "Fault",
    "FaultKind",
    "Fired",
    "InjectedError",
    "Injection",
    "Where",
    "inject",
    "kill",
    "point",
    "resume",
    "stop",
]
