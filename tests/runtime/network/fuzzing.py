"""How hard the fuzzing of this folder tries: a little in every run, DANAUS_FUZZ_EXAMPLES times per test in a soak."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("DANAUS_FUZZ_EXAMPLES", "0"))


def fuzzed(examples: int) -> settings:
    """Settings of a test that tries so many examples in a normal run; a busy machine is no reason to fail."""
    return settings(
        deadline=None,
        max_examples=EXAMPLES or examples,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        report_multiple_bugs=False,
    )
