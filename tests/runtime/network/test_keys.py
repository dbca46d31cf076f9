"""A secret makes the same keys everywhere, and its file is nobody else's."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest
import zmq

from danaus.runtime.network import keys
from danaus.tools import key as key_command

if TYPE_CHECKING:
    from pathlib import Path

SECRET = bytes(range(32))


def text_of(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()


def test_both_sides_make_the_same_keys_and_every_role_and_use_another() -> None:
    pairs = [keys.derive(SECRET, role, use) for role in ("listener", "caller") for use in ("host", "job")]

    assert pairs[0] == keys.derive(bytes(SECRET), "listener", "host")
    assert len({pair.public for pair in pairs}) == len({pair.secret for pair in pairs}) == 4
    assert all(zmq.curve_public(pair.secret) == pair.public for pair in pairs)
    assert keys.derive(SECRET[::-1], "listener", "host") != pairs[0]


def test_a_pair_shows_its_public_half_only() -> None:
    pair = keys.derive(SECRET, "caller", "job")

    assert pair.public.decode() in repr(pair)
    assert pair.secret.decode() not in repr(pair)


def test_a_secret_of_another_length_is_refused_without_being_shown() -> None:
    with pytest.raises(ValueError, match="32 bytes, this one 9") as raised:
        keys.derive(b"tell-none", "caller", "host")

    assert "tell-none" not in str(raised.value)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_a_key_file_is_for_its_owner_only_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "key"
    before = os.umask(umask)
    try:
        keys.create_key_file(path)
    finally:
        os.umask(before)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.format_key(keys.read_key_file(path)) == path.read_bytes()


def test_two_key_files_hold_different_keys(tmp_path: Path) -> None:
    keys.create_key_file(tmp_path / "a")
    keys.create_key_file(tmp_path / "b")

    assert keys.read_key_file(tmp_path / "a") != keys.read_key_file(tmp_path / "b")


@pytest.mark.parametrize("kind", ["file", "dangling link", "directory"])
def test_a_key_file_replaces_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "key"
    if kind == "file":
        path.write_text("precious", encoding="ascii")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(FileExistsError, match="lock out every host"):
        keys.create_key_file(path)

    assert kind != "file" or text_of(path) == "precious"
    assert not (tmp_path / "elsewhere").exists()


def test_nothing_is_left_of_a_key_file_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(OSError, match="no space"):
        keys.create_key_file(tmp_path / "key")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666, 0o700 | 0o001])
def test_a_key_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    keys.create_key_file(path)
    path.chmod(mode)

    with pytest.raises(PermissionError, match=f"mode {mode:04o}.*chmod 600") as raised:
        keys.read_key_file(path)

    assert text_of(path) not in str(raised.value)


def test_a_key_file_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    keys.create_key_file(path)
    owner = path.stat().st_uid
    if owner == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)

    with pytest.raises(PermissionError, match="make your own copy"):
        keys.read_key_file(path)


def test_a_key_is_read_through_a_link_as_secrets_are_mounted(tmp_path: Path) -> None:
    keys.create_key_file(tmp_path / "real")
    (tmp_path / "key").symlink_to("real")

    assert keys.read_key_file(tmp_path / "key") == keys.read_key_file(tmp_path / "real")


def test_no_key_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="danaus key FILE"):
        keys.read_key_file(tmp_path / "key")


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_what_is_no_file_is_no_key(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "key"
    path.mkdir(0o700) if kind == "directory" else os.mkfifo(path, 0o600)

    with pytest.raises(ValueError, match="no regular file"):
        keys.read_key_file(path)


GOOD = keys.format_key(SECRET).strip()


@pytest.mark.parametrize(
    "text",
    [b"", b"\n", GOOD[:-1], GOOD + b"0", GOOD[:-1] + b'"', GOOD[:-1] + b"\xff", b"#" * 40, b"A" * 5000],
    ids=["empty", "blank", "short", "long", "not of Z85", "not ASCII", "overflow", "huge"],
)
def test_a_malformed_key_is_refused_without_being_shown(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(text)
    path.chmod(0o600)

    with pytest.raises(ValueError, match="holds no key") as raised:
        keys.read_key_file(path)

    error: BaseException | None = raised.value
    while error is not None:
        assert text[:8].decode("latin-1").strip() in {"", *str(path)} or text[:8].decode("latin-1") not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_the_command_makes_a_key_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "key"

    assert key_command.main([str(path)]) == 0
    first = keys.read_key_file(path)
    assert key_command.main([str(path)]) == 1

    shown = capsys.readouterr()
    assert keys.read_key_file(path) == first
    assert "would lock out" in shown.err
    assert text_of(path) not in shown.out + shown.err


def test_the_command_says_why_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert key_command.main([str(tmp_path / "no" / "key")]) == 1

    assert "No such file" in capsys.readouterr().err
