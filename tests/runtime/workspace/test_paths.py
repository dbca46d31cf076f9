"""What the controller's paths are called on other hosts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgpack
import pytest

from danaus.runtime.workspace.paths import (
    Workspace,
    copy_directory,
    inherit,
    map_path,
    map_sys_path,
    path_map,
    workspace_directory,
    workspace_of,
    workspaces_of,
)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where hosts keep what they are sent."""
    monkeypatch.setenv("DANAUS_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working directory."""
    (tmp_path / "laptop/proj/src").mkdir(parents=True)
    return tmp_path / "laptop/proj"


def sent(workspace: Workspace, host: str) -> str:
    """Have ``host`` hold a copy; return its place."""
    place = copy_directory(workspace.workspace_id, host)
    os.makedirs(place)
    return place


def over_the_wire(packed: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(packed) or b"")


class FakeProc:
    """A process that knows of workspaces."""


# names:


def test_a_workspace_has_the_same_name_however_it_is_called(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work.parent / "link").symlink_to(work)
    monkeypatch.chdir(work)
    names = [str(work), ".", f"{work}/", f"{work}/src/..", str(work.parent / "link")]

    assert len({workspace_of(name, slot=0) for name in names}) == 1
    assert workspace_of(".", slot=0).workspace_id.startswith("proj-")
    assert workspace_of("..", slot=0).workspace_id != workspace_of(".", slot=0).workspace_id


def test_hosts_that_share_a_home_directory_have_copies_of_their_own(state: Path) -> None:
    one, two = workspace_directory("proj-1", "node1"), workspace_directory("proj-1", "node2")

    assert one != two
    assert {one.parent.parent, two.parent.parent} == {state / "workspaces"}


@pytest.mark.parametrize("name", ["../../etc", "/etc", "..", "", "a/b", ".hidden"])
def test_no_name_leads_out_of_the_state_directory(state: Path, name: str) -> None:
    for place in (workspace_directory(name, "node1"), workspace_directory("proj-1", name)):
        assert Path(os.path.normpath(place)).parent.parent == state / "workspaces"


def test_the_state_directory_is_the_users_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DANAUS_STATE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert workspace_directory("w", "h") == tmp_path / "danaus/workspaces/h/w"

    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert workspace_directory("w", "h") == Path("/home/me/.local/state/danaus/workspaces/h/w")


# maps:


def test_paths_inside_lead_to_the_copy_on_another_host(work: Path) -> None:
    workspace = workspace_of(str(work), slot=0)
    copy = sent(workspace, "node1")

    mapped = path_map(over_the_wire([workspace.pack([])]), host="node1", slot=1)

    assert map_path(str(work), mapped) == copy
    assert map_path(f"{work}/", mapped) == copy
    assert map_path(f"{work}/src/a.py", mapped) == f"{copy}/src/a.py"
    unchanged = [f"{work}er", str(work.parent), "/usr/lib", "", "src", "train.py"]
    assert [map_path(path, mapped) for path in unchanged] == unchanged


def test_paths_that_lead_inside_through_links_do_so_on_other_hosts(work: Path) -> None:
    (work.parent / "link").symlink_to(work / "src")
    (work.parent / "alias").symlink_to(work)
    workspace = workspace_of(str(work), slot=0)
    copy = sent(workspace, "node1")
    names = [str(work.parent / "link"), str(work.parent / "alias/src"), "/usr", ""]

    mapped = path_map(over_the_wire([workspace.pack(names)]), host="node1", slot=1)

    assert [map_path(name, mapped) for name in names] == [f"{copy}/src", f"{copy}/src", "/usr", ""]


def test_on_the_host_that_sent_it_nothing_is_mapped_elsewhere(work: Path) -> None:
    workspace = workspace_of(str(work), slot=0)
    sent(workspace, "laptop")

    mapped = path_map([workspace.pack([])], host="laptop", slot=0)

    assert map_path(f"{work}/src", mapped) == f"{work}/src"


def test_a_host_without_a_copy_uses_the_paths_as_they_are(work: Path) -> None:
    assert path_map([workspace_of(str(work), slot=0).pack([])], host="node1", slot=1) == {}


def test_the_innermost_of_two_workspaces_counts(work: Path) -> None:
    outer, inner = workspace_of(str(work), slot=0), workspace_of(str(work / "src"), slot=0)
    copies = sent(outer, "node1"), sent(inner, "node1")

    mapped = path_map([outer.pack([]), inner.pack([])], host="node1", slot=1)

    assert map_path(f"{work}/a", mapped) == f"{copies[0]}/a"
    assert map_path(f"{work}/src/a", mapped) == f"{copies[1]}/a"


def test_processes_of_another_host_spawn_further_ones_with_the_same_code(work: Path) -> None:
    workspace = workspace_of(str(work), slot=0)
    copies = {host: sent(workspace, host) for host in ("node1", "node2")}
    order = over_the_wire([workspace.pack([str(work / "src")])])
    on_node1: Any = FakeProc()

    inherit(on_node1, order, path_map(order, host="node1", slot=1))
    [known] = workspaces_of(on_node1).values()
    further = over_the_wire([known.pack([f"{copies['node1']}/src"])])

    def src_on(host: str, slot: int) -> str:
        return map_path(f"{copies['node1']}/src", path_map(further, host=host, slot=slot))

    assert src_on("node1", 1) == f"{copies['node1']}/src"
    assert src_on("node2", 2) == f"{copies['node2']}/src"
    assert src_on("laptop", 0) == f"{work}/src"
    assert (known.is_sent_from_here, workspace.is_sent_from_here) == (False, True)


# the search path:


def test_on_the_same_host_the_search_path_is_the_callers() -> None:
    assert map_sys_path(["", "/a", "/w/src"], {"/w": "/w"}, own=None) == ["", "/a", "/w/src"]


def test_on_another_host_the_workspace_comes_first_then_what_is_installed_then_what_else_is_there(
    tmp_path: Path,
) -> None:
    shared = str(tmp_path)
    theirs = ["/w/scripts", "/laptop/site-packages", shared, "", "/w", "/venv/lib"]

    found = map_sys_path(theirs, {"/w": "/copy"}, own=["/venv/lib", "/usr/lib"])

    assert found == ["/copy/scripts", "", "/copy", "/venv/lib", "/usr/lib", shared]
