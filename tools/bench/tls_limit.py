"""Measures what Python's TLS allows without the runtime: one process sends, the other receives into warm memory.

Imports nothing of danaus; the file is also the sending process (``python tls_limit.py CERTIFICATE PORT SIZE``).
"""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import time
from typing import Final

WAIT_S: Final = 60.0


class PlainTls:
    """A TLS 1.3 connection over loopback, both ends with the certificate of the file ``pem``."""

    def __init__(self, pem: str, size_bytes: int) -> None:
        self._memory = memoryview(bytearray(b"\1") * size_bytes)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(WAIT_S)
            command = [sys.executable, __file__, pem, str(listener.getsockname()[1]), str(size_bytes)]
            self._process = subprocess.Popen(command)
            accepted = listener.accept()[0]
        accepted.settimeout(WAIT_S)
        self._connection = _context(ssl.PROTOCOL_TLS_SERVER, pem).wrap_socket(accepted, server_side=True)

    def times(self, count: int) -> list[float]:
        """Return the seconds of each of ``count`` transfers, from the asking to the last byte."""
        return [self._time() for _ in range(count)]

    def _time(self) -> float:
        start, done = time.perf_counter(), 0
        self._connection.sendall(b"x")
        while done < len(self._memory):
            got = self._connection.recv_into(self._memory[done:])
            if not got:
                raise ConnectionError("the sender of the TLS limit has ended")
            done += got
        return time.perf_counter() - start

    def close(self) -> None:
        """End the other process."""
        self._connection.close()
        self._process.kill()
        self._process.wait(WAIT_S)


def _context(side: int, pem: str) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(pem)
    context.load_verify_locations(pem)
    return context


def _send(pem: str, port: str, size: str) -> None:
    memory = memoryview(bytearray(b"\1") * int(size))
    raw = socket.create_connection(("127.0.0.1", int(port)), WAIT_S)
    with _context(ssl.PROTOCOL_TLS_CLIENT, pem).wrap_socket(raw) as connection:
        connection.settimeout(None)
        while connection.recv(1):
            connection.sendall(memory)


if __name__ == "__main__":
    _send(*sys.argv[1:])
