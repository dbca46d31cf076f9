"""Which versions hosts have to share with the controller, and what is said where they do not."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest

import danaus
from danaus.runtime.workspace.errors import VersionMismatch
from danaus.runtime.workspace.versions import Difference, compare, own_versions

OWN = {
    "python": "3.11.7",
    "danaus": "0.1.0",
    "torch": "2.13.0+cpu",
    "numpy": "2.4.6",
    "cloudpickle": "3.1.2",
    "msgpack": "1.2.4",
    "pyzmq": "27.3.0",
}


def own(**changed: str) -> dict[str, str]:
    return OWN | changed


def test_own_versions_name_python_danaus_and_what_pickles_depend_on() -> None:
    versions = own_versions()

    assert versions["python"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    assert versions["danaus"] == danaus.__version__
    assert versions["cloudpickle"]
    assert set(versions) == set(OWN)


def test_own_versions_import_none_of_the_packages() -> None:
    code = (
        "import sys; from danaus.runtime.workspace.versions import own_versions; own_versions(); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], timeout=15, check=False).returncode == 0


@pytest.mark.parametrize(
    "versions",
    [
        own(),
        own(python="3.11.2"),
        own(torch="2.13.0+cu130"),
        own(torch="2.13.0"),
        own(numpy="2.0.1", msgpack="1.0.5", pyzmq="27.0.0"),
        own(another="1.0"),
    ],
)
def test_hosts_that_differ_in_nothing_that_matters_are_the_same(versions: dict[str, str]) -> None:
    assert compare(own(), {"node1": versions}) == []


@pytest.mark.parametrize(
    ("package", "version", "expected"),
    [
        ("python", "3.12.1", "3.11"),
        ("danaus", "0.1.1", "0.1.0"),
        ("torch", "2.12.0+cpu", "2.13.0"),
        ("torch", "", "2.13.0"),
        ("numpy", "1.26.4", "2"),
        ("cloudpickle", "3.1.1", "3.1.2"),
        ("pyzmq", "26.4.0", "27"),
    ],
)
def test_a_version_that_matters_is_told(package: str, version: str, expected: str) -> None:
    found = compare(own(), {"node1": own(**{package: version}), "node2": own()})

    assert found == [Difference(package, expected, version, ("node1",))]


def test_hosts_with_the_same_version_are_told_together() -> None:
    others = {"c": own(torch="2.12.0"), "a": own(torch="2.12.0"), "b": own(torch="2.11.0"), "d": own()}

    assert compare(own(), others) == [
        Difference("torch", "2.13.0", "2.12.0", ("c", "a")),
        Difference("torch", "2.13.0", "2.11.0", ("b",)),
    ]


def test_a_laptop_without_torch_drives_hosts_that_have_it_as_long_as_they_agree() -> None:
    others = {"a": own(), "b": own(torch="2.13.0+cu130"), "c": own(torch="2.12.0"), "d": own(torch="")}

    assert compare(own(torch=""), {"a": own(), "d": own(torch="")}) == []
    assert compare(own(torch=""), others) == [Difference("torch", "2.13.0", "2.12.0", ("c",))]


def test_a_host_that_tells_nothing_lacks_everything_that_has_to_be_there() -> None:
    assert {each.package for each in compare(own(), {"old": {}})} == set(OWN)


def test_the_error_lists_the_hosts_that_differ_and_what_to_do() -> None:
    other = own(torch="2.12.0+cu130", python="3.12.1")
    error = VersionMismatch(compare(own(), {"node1": other, "node2": other, "node3": own(torch=""), "node4": own()}))

    text = str(error)

    assert "3 hosts differ" in text
    assert "node1, node2: python 3.12.1 (expected 3.11), torch 2.12.0+cu130 (expected 2.13.0)" in text
    assert "node3: torch is not installed (expected 2.13.0)" in text
    assert "node4" not in text
    assert "pip install 'torch==2.13.0'" in text
    assert "with Python 3.11" in text


def test_the_error_names_some_of_very_many_hosts() -> None:
    others = {f"node{index}": own(danaus="0.0.9") for index in range(64)}

    text = str(VersionMismatch(compare(own(), others)))

    assert "node0, " in text
    assert "node7 and 56 more: danaus 0.0.9 (expected 0.1.0)" in text


def test_the_error_keeps_its_fields_when_it_is_pickled() -> None:
    error: Any = VersionMismatch(compare(own(), {"node1": own(danaus="2")}))

    copy = pickle.loads(pickle.dumps(error))

    assert (type(copy), copy.differences, str(copy)) == (VersionMismatch, error.differences, str(error))
    assert isinstance(copy, danaus.DanausError)
