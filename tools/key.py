"""`danaus key FILE`: makes the key that hosts and controllers share."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ..runtime.network.keys import create_key_file

if TYPE_CHECKING:
    from collections.abc import Sequence

SUMMARY = "create a key file for `danaus host` and attach_to_hosts()"


def main(arguments: Sequence[str]) -> int:
    """Create a key file; return 1 if that is not possible, after saying why."""
    parser = argparse.ArgumentParser(
        prog="danaus key",
        description=SUMMARY,
        epilog="Copy it to every host by a safe way (scp, a mounted Secret); it is as good as a login there.",
    )
    parser.add_argument("file", metavar="FILE", help="where to write it; must not exist")
    options = parser.parse_args(arguments)
    try:
        create_key_file(options.file)
    except OSError as error:
        print(f"danaus key: {error}", file=sys.stderr)
        return 1
    print(f"{options.file}: a new key that only you can read; whoever has a copy controls the hosts that use it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
