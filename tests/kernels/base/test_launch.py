"""What wrappers refuse, and what is left of the package where triton is not installed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from danaus.kernels import launch
from danaus.kernels.launch import MissingTritonError, cdiv, check_device, is_interpreting, next_power_of_2, num_sms


def test_an_unknown_implementation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"gelu: impl='cuda' is not there, it has 'reference', 'triton'$"):
        check_device("gelu", "cuda", torch.ones(1), choices=("reference", "triton"))


def test_tensors_on_different_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="the tensors are on cpu, meta, move them to one device"):
        check_device("gelu", "reference", torch.ones(1), None, torch.ones(1, device="meta"))


def test_a_cpu_tensor_without_the_interpreter_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_INTERPRETING", False)

    with pytest.raises(ValueError, match=r"needs tensors on a GPU, these are on cpu: .*TRITON_INTERPRET=1"):
        check_device("gelu", "triton", torch.ones(1))
    check_device("gelu", "reference", torch.ones(1))


def test_a_gpu_that_is_not_the_current_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    launch._check_current("gelu", torch.device("cuda:0"))
    launch._check_current("gelu", torch.device("cuda"))
    with pytest.raises(ValueError, match=r"on cuda:1 and the current GPU is cuda:0: .*torch\.cuda\.device\(1\)"):
        launch._check_current("gelu", torch.device("cuda:1"))


def test_a_missing_triton_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "HAS_TRITON", False)

    with pytest.raises(MissingTritonError, match=r"pip install 'danaus\[gpu\]'"):
        check_device("gelu", "triton", torch.ones(1))
    assert not is_interpreting()


WITHOUT_TRITON = """
import importlib, pkgutil, sys
sys.modules["triton"] = None
from danaus import kernels
from danaus.kernels.launch import MissingTritonError, tl, triton

@triton.jit
def kernel(x, BLOCK: tl.constexpr):
    pass

try:
    kernel[(1,)](1)
except MissingTritonError:
    pass
else:
    raise SystemExit("it was launched")
for module in pkgutil.walk_packages(kernels.__path__, "danaus.kernels."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert not any(name.startswith("triton.") for name in sys.modules)
"""


@pytest.mark.timeout(70)
def test_every_module_can_be_imported_without_triton() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_TRITON], check=True, timeout=60)


COLD = """
import importlib, os, pkgutil, torch
torch.cuda.init = torch.cuda._lazy_init = None
from danaus import kernels
for module in pkgutil.walk_packages(kernels.__path__, "danaus.kernels."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert os.listdir(os.environ["TRITON_CACHE_DIR"]) == []
"""


@pytest.mark.timeout(70)
def test_importing_compiles_nothing_and_does_not_touch_cuda(tmp_path: os.PathLike[str]) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}

    subprocess.run([sys.executable, "-c", COLD], check=True, timeout=60, env=environment)


@pytest.mark.timeout(70)
def test_the_folder_itself_imports_neither_torch_nor_triton() -> None:
    code = "import sys; sys.modules.update(torch=None, triton=None); import danaus.kernels"

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(("number", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_2(number: int, power: int) -> None:
    assert next_power_of_2(number) == power


@pytest.mark.parametrize(("number", "divisor", "quotient"), [(0, 8, 0), (1, 8, 1), (8, 8, 1), (9, 8, 2)])
def test_cdiv_rounds_up(number: int, divisor: int, quotient: int) -> None:
    assert cdiv(number, divisor) == quotient


def test_a_cpu_counts_as_one_multiprocessor() -> None:
    assert num_sms(torch.device("cpu")) == 1
