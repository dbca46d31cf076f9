"""Checks, times and tunes the kernels; ``python -m danaus.kernels.bench --help`` says how."""

__all__: list[str] = []
