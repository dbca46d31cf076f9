"""Triton kernels, each with the plain torch that defines its result. Knows torch and triton, nothing of the runtime.

Import from the operation's own module, for example ``from danaus.kernels.rmsnorm import rmsnorm``; importing this
folder imports neither torch nor triton. Every operation takes ``impl=``:

    "triton"     the kernel; refused for tensors that are not on a GPU (unless TRITON_INTERPRET=1), never replaced
    "reference"  plain torch on any device, readable before fast: the definition
    "torch"      the best that torch itself offers, where it offers something

and is registered with ``torch.library``, so that ``torch.compile`` and FSDP see one opaque, differentiable operator.

    launch.py     what every wrapper checks before a launch
    tuning.py     block sizes: a default in code, a better one per device in ``configs/``
    bench/        ``python -m danaus.kernels.bench``: checks, times, tunes, and writes the table in README.md
    README.md     what there is, what it costs, what was measured
"""

__all__: list[str] = []
