"""Who belongs to a cluster: a private certificate authority and the nodes' certificates.

A peer is believed for a certificate that this authority signed, that is valid now, and that may
act on both sides of a connection. Its common name is the node's name; no host name is compared.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shoal.errors import ConfigError, PeerRefused

CA_FILE, CA_KEY_FILE = "ca.pem", "ca.key"
NODE_FILE, NODE_KEY_FILE = "node.pem", "node.key"
AUTHORITY_LIFETIME = timedelta(days=3652)
NODE_LIFETIME = timedelta(days=397)
# Clocks differ: a certificate is valid a little before it was made.
_CLOCK_SKEW = timedelta(minutes=10)
_BOTH_SIDES = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Identity:
    """This node: its name, and what it shows and asks of others on either side of a connection."""

    node: str
    folder: Path
    server_context: ssl.SSLContext
    client_context: ssl.SSLContext


def create_authority(folder: Path) -> bytes:
    """A new authority in `folder` (ca.pem, ca.key); its certificate as PEM. Raises ConfigError."""
    if (folder / CA_KEY_FILE).exists():
        raise ConfigError(f"{folder} holds an authority already: keep it, or choose another folder")
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Shoal cluster authority")
    certificate = (
        _builder(name, name, key.public_key(), key.public_key(), AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    ca_pem = certificate.public_bytes(Encoding.PEM)
    _write_secret(folder / CA_KEY_FILE, _key_pem(key))
    _write(folder / CA_FILE, ca_pem)
    return ca_pem


def make_request(folder: Path, node: str) -> bytes:
    """A signing request (PEM) for the key in `folder`, which is made if there is none."""
    _check_name(node)
    path = folder / NODE_KEY_FILE
    if not path.exists():
        _write_secret(path, _key_pem(ec.generate_private_key(ec.SECP256R1())))
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(node))
    return builder.sign(_load_key(path), hashes.SHA256()).public_bytes(Encoding.PEM)


def issue(
    authority: Path,
    csr_pem: bytes,
    *,
    node: str,
    addresses: Sequence[str],
    lifetime: timedelta = NODE_LIFETIME,
) -> bytes:
    """A certificate (PEM) for the key of a request, under the name `node`, whatever it asks for.

    `addresses` are the node's IP addresses and host names. Raises PeerRefused for a request that
    is malformed or not signed by its own P-256 key, ConfigError for the rest.
    """
    _check_name(node)
    ca_certificate, ca_key = (
        _load_certificate(authority / CA_FILE),
        _load_key(authority / CA_KEY_FILE),
    )
    public_key = _requested_key(csr_pem)
    builder = (
        _builder(_name(node), ca_certificate.subject, public_key, ca_key.public_key(), lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_BOTH_SIDES), critical=False)
    )
    if addresses:
        names = [_alternative_name(address) for address in addresses]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM)


def install(folder: Path, cert_pem: bytes, ca_pem: bytes) -> Identity:
    """Keep the certificate issued for `make_request(folder, …)`. Raises as load_identity does."""
    _write(folder / CA_FILE, ca_pem)
    _write(folder / NODE_FILE, cert_pem)
    return load_identity(folder)


def load_identity(folder: Path) -> Identity:
    """The identity that `install` left in `folder`.

    Raises ConfigError if a file is missing or unreadable, and PeerRefused if the certificate is
    expired, of another authority or of another key.
    """
    certificate, ca = _load_certificate(folder / NODE_FILE), _load_certificate(folder / CA_FILE)
    key = _load_key(folder / NODE_KEY_FILE)
    _check_certificate(folder, certificate, ca)
    if certificate.public_key() != key.public_key():
        raise PeerRefused(
            f"{folder / NODE_FILE} is for another key than {NODE_KEY_FILE}: join again"
        )
    return Identity(
        node=_common_name(certificate),
        folder=folder,
        server_context=_context(folder, ssl.PROTOCOL_TLS_SERVER),
        client_context=_context(folder, ssl.PROTOCOL_TLS_CLIENT),
    )


def fingerprint(ca_pem: bytes) -> str:
    """The SHA-256 of a certificate in hex: by it a joining node knows the right authority."""
    return hashlib.sha256(_parse(ca_pem, "the authority").public_bytes(Encoding.DER)).hexdigest()


def peer_name(cert_der: bytes) -> str:
    """The node that a peer's certificate, which TLS has verified, names. Raises PeerRefused."""
    certificate = x509.load_der_x509_certificate(cert_der)
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.OCSP_SIGNING])
    if not set(_BOTH_SIDES) <= set(usage):
        raise PeerRefused("its certificate is not a node's: it may not act on both sides")
    return _common_name(certificate)


def _context(folder: Path, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(folder / CA_FILE)
    context.load_cert_chain(folder / NODE_FILE, folder / NODE_KEY_FILE)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        # Sessions are not resumed, and tickets would be unread bytes on a one-way connection.
        context.num_tickets = 0
    return context


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False
        )
    )


def _check_certificate(folder: Path, certificate: x509.Certificate, ca: x509.Certificate) -> None:
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise PeerRefused(
            f"{folder / NODE_FILE} is not signed by {CA_FILE} beside it: join the cluster again"
        ) from error
    for path, each in ((folder / NODE_FILE, certificate), (folder / CA_FILE, ca)):
        if not each.not_valid_before_utc <= datetime.now(UTC) <= each.not_valid_after_utc:
            raise PeerRefused(
                f"{path} is valid from {each.not_valid_before_utc} to {each.not_valid_after_utc}, "
                "not now: join the cluster again, or set this machine's clock"
            )


def _requested_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        key = request.public_key()
    except ValueError as error:
        raise PeerRefused(f"the request for a certificate is malformed: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != ec.SECP256R1.name:
        raise PeerRefused("the request for a certificate is for a key that is not P-256")
    if not request.is_signature_valid:
        raise PeerRefused("the request for a certificate is not signed by its own key")
    return key


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        pass
    try:
        return x509.DNSName(address)
    except ValueError as error:
        raise ConfigError(f"'{address}' is neither an IP address nor a host name") from error


def _check_name(node: str) -> None:
    if not _NODE_NAME.fullmatch(node):
        raise ConfigError(
            f"'{node}' cannot name a node: use up to 63 letters, digits, dots and hyphens"
        )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if not names:
        raise PeerRefused("the certificate names no node")
    return str(names[0].value)


def _load_certificate(path: Path) -> x509.Certificate:
    return _parse(_read(path), str(path))


def _parse(pem: bytes, what: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise ConfigError(f"{what} is no certificate in PEM: {error}") from error


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no private key in PEM: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an elliptic-curve key")
    return key


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}): `shoal head` or `shoal join` writes it"
        ) from error


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _write_secret(path: Path, data: bytes) -> None:
    """Never readable by others, not even for a moment."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
