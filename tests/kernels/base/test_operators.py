"""Every operation has the same form, whoever wrote it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, Any

import torch
from torch._library import simple_registry

from danaus import kernels

if TYPE_CHECKING:
    from collections.abc import Callable

MODULES = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(kernels.__path__, "danaus.kernels.")
    if ".bench" not in found.name
]


def wrappers() -> list[Callable[..., Any]]:
    """Every public function with a choice of implementations, once."""
    found = {
        value
        for module in MODULES
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__.startswith("danaus.kernels.")
        if "impl" in inspect.signature(value).parameters
    }
    return sorted((function for function in found if function.__name__ != "check_device"), key=lambda f: f.__qualname__)


def test_the_kernel_is_the_default_and_is_chosen_by_name() -> None:
    for function in wrappers():
        choice = inspect.signature(function).parameters["impl"]

        assert choice.kind is inspect.Parameter.KEYWORD_ONLY, function
        assert choice.default == "triton", function


def test_every_wrapper_says_what_it_takes_and_refuses() -> None:
    silent = [f.__qualname__ for f in wrappers() if "Raises:" not in (f.__doc__ or "")]

    assert silent == []


def test_every_operator_tells_the_compiler_the_shapes_of_its_results() -> None:
    ours = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("danaus::")]

    assert ours
    assert [
        name for name in ours if simple_registry.singleton.find(name).fake_impl.kernel is None and not has_meta(name)
    ] == []


def has_meta(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta")
