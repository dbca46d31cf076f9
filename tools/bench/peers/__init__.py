"""Other runtimes, measured by the same code; each imported only when asked for."""

from .load import PEERS, load_peer

__all__ = ["PEERS", "load_peer"]
