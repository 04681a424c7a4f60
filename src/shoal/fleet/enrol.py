"""The joining side: it knows the head by the token's fingerprint before it says a secret."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import httpx
import msgspec

from shoal.errors import ConfigError, PeerLost, PeerRefused
from shoal.fleet.registrar import JoinAnswer, JoinRequest
from shoal.fleet.state import Membership, StateFolder, bracketed, check_node_name
from shoal.fleet.tokens import TokenText
from shoal.parallel.identity import CA_FILE, fingerprint, install, make_request

TIMEOUT_S = 10.0
_MAX_PEM_BYTES = 16 * 1024


def enrol(
    folder: StateFolder, token: TokenText, *, head_address: str, port: int, node: str, address: str
) -> Membership:
    """Become a node: afterwards `folder` holds all that it needs.

    Raises PeerLost if the head does not answer, PeerRefused if it is not the token's head or does
    not let this machine in, ConfigError for a name that cannot be.
    """
    check_node_name(node)
    ca_pem = fetch_authority(head_address, port, token.fingerprint)
    request = JoinRequest(
        token=str(token),
        node=node,
        addresses=[address],
        csr=make_request(folder.identity, node).decode(),
    )
    answer = _ask(head_address, port, ca_pem, request)
    install(folder.identity, answer.certificate.encode(), ca_pem)
    folder.write(folder.ray_token, answer.ray_token.encode())
    membership = Membership(
        cluster=answer.cluster, node=node, address=address, head_address=head_address, port=port
    )
    folder.save(membership)
    return membership


def fetch_authority(head_address: str, port: int, wanted_fingerprint: str) -> bytes:
    """The certificate (PEM) of the authority that the token names. Raises PeerLost, PeerRefused."""
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    response = _send(head_address, port, unverified, "GET", "/ca")
    where = bracketed(head_address, port)
    try:
        found = fingerprint(response.content[:_MAX_PEM_BYTES])
    except ConfigError:
        raise PeerRefused(f"{where} answers, but not as a head does: is the port right?") from None
    if found != wanted_fingerprint:
        raise PeerRefused(
            f"{where} is not the head that this token is for: use a token of that head; if it is "
            "one, somebody stands in between, and nothing was said to them"
        )
    return response.content


def answers(folder: StateFolder, membership: Membership) -> bool:
    """Whether the head, proven by its certificate, is there. Raises PeerRefused for another."""
    ca_pem = (folder.identity / CA_FILE).read_bytes()
    try:
        _send(membership.head_address, membership.port, _verified(ca_pem), "GET", "/ca")
    except PeerLost:
        return False
    return True


def route_to(host: str, port: int) -> tuple[str, str]:
    """(the IP address of `host`, this machine's own address on the way there).

    Raises PeerLost for an unknown host or no way to it.
    """
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            # Connecting a datagram socket sends nothing: it only looks up the route.
            probe.connect(target)
            return str(target[0]), str(probe.getsockname()[0])
    except OSError as error:
        raise PeerLost(f"there is no way to {host}: {error.strerror or error}") from error


def _ask(head_address: str, port: int, ca_pem: bytes, request: JoinRequest) -> JoinAnswer:
    body = msgspec.json.encode(request)
    response = _send(head_address, port, _verified(ca_pem), "POST", "/join", body)
    try:
        if response.status_code == httpx.codes.OK:
            return msgspec.json.decode(response.content, type=JoinAnswer)
        error = msgspec.json.decode(response.content)["error"]
    except (msgspec.MsgspecError, KeyError, TypeError) as reason:
        raise PeerRefused(
            f"the head answered {response.status_code} with something else than a head would: "
            "does it run the same version of Shoal?"
        ) from reason
    raise PeerRefused(f"the head refuses: {error['message']}", code=error["code"])


def _verified(ca_pem: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca_pem.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _send(
    host: str, port: int, context: ssl.SSLContext, method: str, path: str, body: bytes = b""
) -> httpx.Response:
    where = bracketed(host, port)
    try:
        # No proxy from the environment: it would stand in between.
        with httpx.Client(verify=context, trust_env=False, timeout=TIMEOUT_S) as client:
            return client.request(method, f"https://{where}{path}", content=body)
    except httpx.TransportError as error:
        cause = _tls_failure(error)
        if cause is not None:
            raise PeerRefused(
                f"{where} cannot prove that it is the head ({cause.verify_message}): give "
                "'shoal join' the address that 'shoal head' was started with, and a token if it is "
                "another head than before"
            ) from error
        raise PeerLost(
            f"no head answers at {where} ({error}): is 'shoal head' running there, and does a "
            "firewall let the port through?"
        ) from error


def _tls_failure(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error
        error = error.__cause__ or error.__context__
    return None


def authority_fingerprint(folder: Path) -> str:
    return fingerprint((folder / CA_FILE).read_bytes())
