"""Key files, and the CURVE keys that are made of a secret.

One secret is the right to control the hosts that hold it: whoever listens and whoever calls make the same key pairs of
it, so that each knows the other's public key and no certificate is handed around.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import zmq
from zmq.utils import z85

if TYPE_CHECKING:
    from pathlib import Path

Role: TypeAlias = Literal["listener", "caller"]
Use: TypeAlias = Literal["host", "job"]

SECRET_BYTES: Final = 32
_TEXT_CHARS: Final = 40
_PERSON: Final = b"danaus curve 1"
_HOW: Final = "`danaus key FILE` creates one"


@dataclass(frozen=True, slots=True)
class KeyPair:
    """The two halves of a CURVE key, as Z85 text; only the public one is ever shown."""

    public: bytes
    secret: bytes = field(repr=False)


def derive(secret: bytes, role: Role, use: Use) -> KeyPair:
    """Make the key pair of one role, the same wherever ``secret`` is known.

    Args:
        secret: 32 random bytes.
        role: Of the side that binds, or of the side that connects.
        use: ``host`` for daemons and who attaches to them, ``job`` for the agents of one job.

    Raises:
        ValueError: The secret has another length.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, this one {len(secret)}: {_HOW}")
    text = f"{use} {role}".encode()
    private = z85.encode(blake2b(text, digest_size=32, key=secret, person=_PERSON).digest())
    return KeyPair(zmq.curve_public(private), private)


def new_secret() -> bytes:
    """Return a fresh secret."""
    return secrets.token_bytes(SECRET_BYTES)


def create_key_file(path: str | Path) -> None:
    """Write a fresh secret to a file that only its owner can read.

    Raises:
        FileExistsError: There is a file already.
        OSError: It could not be written; nothing is left of it.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags, 0o600)
    except FileExistsError:
        raise FileExistsError(
            f"{path} is there already: a new key would lock out every host that holds the old one; "
            "choose another name, or remove it first"
        ) from None
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, 0o600)
            file.write(format_key(new_secret()))
            file.flush()
            os.fsync(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def read_key_file(path: str | Path) -> bytes:
    """Return the secret that a key file holds.

    Raises:
        FileNotFoundError: There is no such file.
        PermissionError: Others may read it, or it belongs to somebody else.
        ValueError: It is no key file.
    """
    try:
        # Not blocked by a FIFO of that name.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise FileNotFoundError(f"no key file {path}: {_HOW}; hosts and controllers need the same one") from None
    try:
        _check_guarded(os.fstat(fd), path)
        text = os.read(fd, _TEXT_CHARS + 64)
    finally:
        os.close(fd)
    return parse_key(text, str(path))


def _check_guarded(status: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no regular file: {_HOW}")
    # What root owns and nobody else may read was put there for us, as secrets are mounted in containers.
    if status.st_uid not in {os.geteuid(), 0}:
        raise PermissionError(
            f"{path} belongs to user {status.st_uid}, who could change it: make your own copy (chown {os.geteuid()})"
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise PermissionError(
            f"{path} has mode {mode:04o}: whoever reads this key controls every host that holds it; chmod 600 {path}"
        )


def format_key(secret: bytes) -> bytes:
    """Return what a key file holds for ``secret``."""
    return z85.encode(secret) + b"\n"


def parse_key(text: bytes, source: str) -> bytes:
    """Return the secret that ``text``, the content of a key file, stands for.

    Args:
        text: What was read.
        source: Where from, for the error.

    Raises:
        ValueError: It is something else; the error does not show it.
    """
    text = text.strip()
    problem = f"{len(text)} characters instead of {_TEXT_CHARS}"
    if len(text) == _TEXT_CHARS:
        problem = "not Z85 text"
        # What z85 raises shows the content.
        with contextlib.suppress(Exception):
            secret = z85.decode(text)
            if len(secret) == SECRET_BYTES and z85.encode(secret) == text:
                return secret
    raise ValueError(f"{source} holds no key ({problem}): {_HOW}")
