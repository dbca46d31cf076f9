"""What was ordered for a mesh, and what is removed with it."""

from __future__ import annotations

import os
from pathlib import Path  # noqa: TC003  pytest's own, in signatures
from typing import Any

import pytest

from danaus.runtime.host.orders import MAX_SPARE_LOSSES, Orders


def an_order(mesh: str = "crew-1", **changed: Any) -> dict[str, Any]:
    order = {
        "mesh": mesh,
        "name": "crew",
        "count": 2,
        "dims": [["dp", 2]],
        "restartable": True,
        "boot_file": "boot",
        "env": {"A": "1"},
        "gpus": "none",
        "cpus": [[0], [1]],
        "mem_nodes": [],
    }
    return order | changed


def test_a_rank_is_told_what_depends_on_its_rank_and_a_spare_what_does_not(tmp_path: Path) -> None:
    orders = Orders(str(tmp_path), "gpu7")
    order = orders.add(an_order(), "controller.0")

    assert orders.request(order, "crew-1.1~3")["cpus"] == [1]
    assert orders.request(order, "crew-1.1~3")["env"].items() >= {"A": "1", "CUDA_VISIBLE_DEVICES": ""}.items()
    assert orders.request(order, "crew-1.2")["cpus"] is None
    assert "CUDA_VISIBLE_DEVICES" not in orders.request(order, "crew-1.2")["env"]
    assert orders.info(order).restartable
    assert orders.owned_by("controller.0") == ["crew-1"]


@pytest.mark.parametrize(("count", "num_cpus", "threads"), [(1, 8, "8"), (3, 8, "2"), (16, 8, "1"), (2, None, "1")])
def test_the_cpus_are_shared_out_as_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, num_cpus: int | None, threads: str
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: num_cpus)
    orders = Orders(str(tmp_path), "gpu7")
    env = orders.request(orders.add(an_order(count=count, cpus=[]), "controller.0"), "crew-1.0")["env"]

    assert (env["OMP_NUM_THREADS"], env["MKL_NUM_THREADS"]) == (threads, threads)


def test_the_callers_number_of_threads_wins(tmp_path: Path) -> None:
    orders = Orders(str(tmp_path), "gpu7")
    order = orders.add(an_order(env={"OMP_NUM_THREADS": "5"}), "controller.0")

    assert orders.request(order, "crew-1.0")["env"]["OMP_NUM_THREADS"] == "5"


def test_a_host_has_its_share_of_the_ranks_and_spares_of_its_own(tmp_path: Path) -> None:
    orders = Orders(str(tmp_path), "gpu7", slot=4)
    order = orders.add(an_order("crew-1@2+4x2", count=4), "controller.0")

    assert orders.request(order, "crew-1@2+4x2.3")["cpus"] == [1]
    assert orders.request(order, "crew-1@2+4x2.3~1")["path"] == f"{tmp_path}/crew-1.3~1"
    assert orders.spares(order, 2) == ["crew-1@2+4x2.5", "crew-1@2+4x2.7"]
    assert orders.info(order).watcher == "agent@0x1.0"


def test_what_a_mesh_left_goes_with_its_last_process_but_what_makes_it_again_stays(tmp_path: Path) -> None:
    orders = Orders(str(tmp_path), "gpu7")
    orders.add(an_order(), "controller.0")
    for name in ("crew-1.boot@controller.0", "crew-1.1~2", "crew-1.1~2.stacks", "crew-12.0"):
        (tmp_path / name).touch()

    orders.on_empty("crew-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["crew-1.boot@controller.0", "crew-12.0"]

    orders.forget("crew-1")
    orders.on_empty("crew-1")
    assert [path.name for path in tmp_path.iterdir()] == ["crew-12.0"]


def test_a_process_that_died_before_it_ordered_a_mesh_leaves_nothing_of_it(tmp_path: Path) -> None:
    orders = Orders(str(tmp_path), "gpu7")
    for name in ("below-1.boot@crew-1.0", "below-2.boot@crew-1.1"):
        (tmp_path / name).touch()

    orders.on_owner_lost("crew-1.0")

    assert [path.name for path in tmp_path.iterdir()] == ["below-2.boot@crew-1.1"]


def test_spares_that_keep_ending_are_not_replaced_for_ever(tmp_path: Path) -> None:
    orders = Orders(str(tmp_path), "gpu7")

    answers = [orders.may_replace_spare("crew-1.2") for _ in range(MAX_SPARE_LOSSES + 1)]

    assert answers == [True] * MAX_SPARE_LOSSES + [False]
