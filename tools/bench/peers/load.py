"""Finds the adapter of a peer, or says how to install the peer."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ..subject import Subject


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a peer's adapter is, and what it needs installed."""

    module: str
    adapter: str
    requirement: str


PEERS: Final = {
    "monarch": Peer("monarch", "Monarch", "torchmonarch==0.7.0"),
    "ray": Peer("ray", "Ray", "ray==2.60.0"),
}


def load_peer(name: str) -> Subject:
    """Return the adapter of an installed peer.

    Raises:
        ValueError: There is no adapter of this name.
        ImportError: The peer is not installed; says how to install it.
    """
    if name not in PEERS:
        raise ValueError(f"--peer {name}: expected one of {', '.join(PEERS)}")
    peer = PEERS[name]
    try:
        importlib.import_module(peer.module)
    except ImportError as error:
        raise ImportError(f"--peer {name}: {error}; install it with: pip install {peer.requirement}") from error
    return getattr(importlib.import_module(f".{name}_peer", __package__), peer.adapter)()
