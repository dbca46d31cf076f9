"""Where a process is, told from its address."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danaus.runtime.address import agent_of, host_of, mesh_id, mesh_of, name_of, next_address, per_host_of, slots_of


@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=40, unique=True),
    st.integers(1, 9),
)
def test_every_rank_is_found_on_the_host_that_it_was_laid_out_on(slots: list[int], per_host: int) -> None:
    mesh = mesh_id("procs", "a1b2c3", slots, per_host)

    assert slots_of(mesh) == tuple(slots)
    for rank in range(len(slots) * per_host):
        proc = f"{mesh}.{rank}"
        assert host_of(proc) == slots[rank // per_host]
        assert host_of(next_address(proc)) == host_of(proc)
        assert mesh_of(proc) == mesh


def test_a_mesh_of_the_controllers_host_has_a_plain_id() -> None:
    assert mesh_id("procs", "a1b2c3", [0], 4) == "procs-a1b2c3"
    assert host_of("procs-a1b2c3.3~2") == 0
    assert host_of("controller.0") == 0


def test_neighbouring_hosts_are_written_as_a_run() -> None:
    assert mesh_id("procs", "a1b2c3", [1, 2, 3, 7], 2) == "procs-a1b2c3@1:3+7x2"


def test_spares_are_dealt_to_the_hosts_in_turn() -> None:
    mesh = mesh_id("procs", "a1b2c3", [1, 4], 2)

    assert [host_of(f"{mesh}.{rank}") for rank in (4, 5, 6)] == [1, 4, 1]


def test_names_do_not_show_the_layout() -> None:
    assert name_of("my-procs-a1b2c3@1:3x4.5") == "my-procs"
    assert per_host_of("procs-a1b2c3@1:3x4") == 4


def test_agents_have_addresses_of_their_own() -> None:
    assert host_of(agent_of(12)) == 12


@pytest.mark.parametrize("mesh", ["p-a@", "p-a@x", "p-a@3:1x2", "p-a@1+x2", "p-a@1x", "p-a@1:99999999x2", "p-a@-1x2"])
def test_what_is_no_layout_is_refused(mesh: str) -> None:
    if mesh == "p-a@":
        assert slots_of(mesh) == (0,)
        return
    with pytest.raises(ValueError, match=r"p-a@"):
        slots_of(mesh)
