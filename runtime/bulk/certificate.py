"""The job's one certificate: every process of the job has it, and trusts nobody who has another.

A stream between hosts is TLS 1.3 with both ends showing this certificate, which is its own trust anchor; host names say
nothing and are not looked at.
"""

from __future__ import annotations

import datetime
import os
import secrets
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import ssl

FILE: Final = "tls.pem"
"""Its name in the job's directory."""

_DAYS: Final = 3650


def mint() -> bytes:
    """Return a new certificate and its key, as PEM; keep it secret.

    Raises:
        ImportError: The package ``cryptography`` is not installed.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise ImportError("streams between hosts need certificates: pip install 'danaus[hosts]'") from error
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"danaus job {secrets.token_hex(8)}")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks of a cluster differ.
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(pem) + secret


def write(directory: str, pem: bytes) -> None:
    """Put the certificate where the job's processes of this host find it, readable by this user alone."""
    path = os.path.join(directory, FILE)
    descriptor = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(pem)
    os.replace(f"{path}.new", path)


def exists(directory: str) -> bool:
    """Whether the job has a certificate: without one, nothing of it is reachable from other hosts."""
    path = os.path.join(directory, FILE)
    # Empty where the package that mints it is missing.
    return os.path.exists(path) and os.path.getsize(path) > 0


def contexts(directory: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return what a server and a client of this job set their streams up with."""
    import ssl

    path = os.path.join(directory, FILE)
    made = list[ssl.SSLContext]()
    for side in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(path)
        context.load_verify_locations(path)
        made.append(context)
    # Connections are kept, not resumed.
    made[0].num_tickets = 0
    return made[0], made[1]
