"""Certificates: who gets one, what it holds, and what is refused."""

from __future__ import annotations

import hashlib
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from small_cluster import SmallCluster

from shoal.errors import ConfigError, PeerRefused
from shoal.parallel.identity import (
    create_authority,
    fingerprint,
    install,
    issue,
    load_identity,
    make_request,
    peer_name,
)


@pytest.fixture
def cluster(tmp_path: Path) -> SmallCluster:
    return SmallCluster(tmp_path / "cluster")


def request_with(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def test_keys_are_for_their_owner_only(cluster: SmallCluster) -> None:
    cluster.join("a")
    for key in (cluster.folder / "ca" / "ca.key", cluster.folder / "a" / "node.key"):
        assert key.stat().st_mode & 0o777 == 0o600
        assert key.parent.stat().st_mode & 0o777 == 0o700


def test_a_certificate_names_the_node_and_its_addresses(cluster: SmallCluster) -> None:
    certificate = x509.load_pem_x509_certificate(cluster.certificate("node-1"))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert names.get_values_for_type(x509.DNSName) == ["node.example"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert peer_name(certificate.public_bytes(Encoding.DER)) == "node-1"
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_the_authority_lasts_ten_years(cluster: SmallCluster) -> None:
    authority = x509.load_pem_x509_certificate(cluster.ca_pem)
    left = authority.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=3650) < left < timedelta(days=3654)


def test_the_name_is_the_authoritys_decision_not_the_requests(cluster: SmallCluster) -> None:
    request = request_with(ec.generate_private_key(ec.SECP256R1()), "head")
    certificate = issue(cluster.folder / "ca", request, node="b", addresses=[])
    assert peer_name(ssl.PEM_cert_to_DER_cert(certificate.decode())) == "b"


def test_a_node_that_asks_again_keeps_its_key(cluster: SmallCluster) -> None:
    first = cluster.join("a")
    again = install(first.folder, cluster.certificate("a"), cluster.ca_pem)
    assert again.node == "a"


def test_an_authority_is_not_overwritten(cluster: SmallCluster) -> None:
    with pytest.raises(ConfigError, match="holds an authority already"):
        create_authority(cluster.folder / "ca")
    assert (cluster.folder / "ca" / "ca.pem").read_bytes() == cluster.ca_pem


def test_the_fingerprint_is_what_openssl_prints(cluster: SmallCluster) -> None:
    der = ssl.PEM_cert_to_DER_cert(cluster.ca_pem.decode())
    assert fingerprint(cluster.ca_pem) == hashlib.sha256(der).hexdigest()


@pytest.mark.parametrize("file", ["ca.pem", "node.pem", "node.key"])
def test_a_missing_file_says_which_and_who_writes_it(cluster: SmallCluster, file: str) -> None:
    folder = cluster.join("a").folder
    (folder / file).unlink()
    with pytest.raises(ConfigError, match=f"{file} cannot be read .*shoal join"):
        load_identity(folder)


@pytest.mark.parametrize("file", ["ca.pem", "node.pem", "node.key"])
def test_a_damaged_file_is_named(cluster: SmallCluster, file: str) -> None:
    folder = cluster.join("a").folder
    (folder / file).write_bytes(b"-----BEGIN nothing")
    with pytest.raises(ConfigError, match=file):
        load_identity(folder)


def test_a_certificate_of_another_authority_is_refused(
    cluster: SmallCluster, tmp_path: Path
) -> None:
    foreign = SmallCluster(tmp_path / "foreign")
    with pytest.raises(PeerRefused, match="not signed by"):
        install(foreign.folder / "a", foreign.certificate("a"), cluster.ca_pem)


def test_a_certificate_for_another_key_is_refused(cluster: SmallCluster) -> None:
    cluster.join("a")
    with pytest.raises(PeerRefused, match="another key"):
        install(cluster.folder / "a", cluster.certificate("b"), cluster.ca_pem)


def test_an_expired_certificate_is_refused(cluster: SmallCluster) -> None:
    certificate = cluster.certificate("a", lifetime=timedelta(seconds=-1))
    with pytest.raises(PeerRefused, match="not now: join the cluster again"):
        install(cluster.folder / "a", certificate, cluster.ca_pem)


@pytest.mark.parametrize("node", ["", "-a", "a b", "ä", "a/b", "x" * 64])
def test_a_bad_node_name_is_refused(cluster: SmallCluster, node: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a node"):
        make_request(cluster.folder / "bad", node)


def test_a_bad_address_is_refused(cluster: SmallCluster) -> None:
    request = make_request(cluster.folder / "a", "a")
    with pytest.raises(ConfigError, match="neither an IP address nor a host name"):
        issue(cluster.folder / "ca", request, node="a", addresses=["näme"])


def test_bad_requests_are_refused(cluster: SmallCluster) -> None:
    good = make_request(cluster.folder / "a", "a")
    other_curve = request_with(ec.generate_private_key(ec.SECP384R1()), "a")
    der = bytearray(x509.load_pem_x509_csr(good).public_bytes(Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM)
    for request, why in (
        (b"nonsense", "malformed"),
        (other_curve, "not P-256"),
        (forged, "own key"),
    ):
        with pytest.raises(PeerRefused, match=why):
            issue(cluster.folder / "ca", request, node="a", addresses=[])


def test_a_certificate_for_one_side_only_is_no_nodes(cluster: SmallCluster) -> None:
    with pytest.raises(PeerRefused, match="both sides"):
        peer_name(ssl.PEM_cert_to_DER_cert(cluster.ca_pem.decode()))
