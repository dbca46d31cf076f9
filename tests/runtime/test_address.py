"""Names of processes: place, incarnation, mesh and rank come apart and together again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danaus.runtime.address import address, incarnation_of, mesh_of, name_of, next_address, place_of, rank_of


@pytest.mark.parametrize(
    ("proc", "place", "mesh_and_name", "rank", "incarnation"),
    [
        ("trainers-a1b2c3.3", "trainers-a1b2c3.3", ("trainers-a1b2c3", "trainers"), 3, 0),
        ("trainers-a1b2c3.3~2", "trainers-a1b2c3.3", ("trainers-a1b2c3", "trainers"), 3, 2),
        ("controller.0", "controller.0", ("controller", "controller"), 0, 0),
        ("a-b-c-0011ff.12~10", "a-b-c-0011ff.12", ("a-b-c-0011ff", "a-b-c"), 12, 10),
    ],
)
def test_an_address_tells_its_parts(
    proc: str, place: str, mesh_and_name: tuple[str, str], rank: int, incarnation: int
) -> None:
    assert place_of(proc) == place
    assert (mesh_of(proc), name_of(proc)) == mesh_and_name
    assert rank_of(proc) == rank
    assert incarnation_of(proc) == incarnation


def test_the_first_incarnation_is_the_place_itself() -> None:
    assert address("m-1.0", 0) == "m-1.0"
    assert address("m-1.0", 1) == "m-1.0~1"


def test_the_next_address_counts_on() -> None:
    assert next_address("m-1.0") == "m-1.0~1"
    assert next_address("m-1.0~9") == "m-1.0~10"


@given(st.from_regex(r"[A-Za-z0-9_]{1,16}-[0-9a-f]{6}", fullmatch=True), st.integers(0, 99_999), st.integers(0, 99_999))
def test_parts_and_address_agree(mesh: str, rank: int, incarnation: int) -> None:
    proc = address(f"{mesh}.{rank}", incarnation)

    assert (mesh_of(proc), rank_of(proc), incarnation_of(proc)) == (mesh, rank, incarnation)
    assert address(place_of(proc), incarnation_of(proc)) == proc
    assert next_address(proc) == address(place_of(proc), incarnation + 1)
