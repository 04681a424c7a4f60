"""Connections between processes: who may connect how, listening, and dialling."""

from __future__ import annotations

import os
import socket
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import ConfigError, PeerLost, PeerRefused
from shoal.parallel.address import HostAddress, UnixAddress, parse_address
from shoal.parallel.channel import Channel, tune
from shoal.parallel.handshake import shake_hands, wrap
from shoal.parallel.identity import Identity
from shoal.parallel.listener import Listener

# What was sent and not acknowledged for so long was sent to a machine that is gone.
UNACKED_S = 1.0
HANDSHAKE_S = 5.0
_BACKLOG = 128
_LOCAL_PEER, _PLAINTEXT_PEER = "local", "plaintext"
# What a channel's `peer` is where nobody shows a certificate.
UNNAMED_PEERS = (_LOCAL_PEER, _PLAINTEXT_PEER)
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True)
class LocalOnly:
    """Nothing leaves the machine: unix sockets in a folder that only this user may enter."""


@dataclass(frozen=True)
class MutualTls:
    """Between machines, TLS 1.3 in which both sides show a certificate of the cluster."""

    identity: Identity


@dataclass(frozen=True)
class Plaintext:
    """Between machines, no encryption, and no check of who connects. For measuring."""


Security = LocalOnly | MutualTls | Plaintext


def listen(
    address: str,
    security: Security,
    *,
    handshake_s: float = HANDSHAKE_S,
    unacked_s: float = UNACKED_S,
) -> Listener:
    """Listen at an address; port 0 lets the system choose one. Unix sockets need no certificate.

    Raises ConfigError for an address that is malformed, taken, not this machine's, or of a scheme
    that `security` does not allow, and for a socket's folder that others may enter.
    """
    target = _allowed(parse_address(address), security)
    try:
        if isinstance(target, UnixAddress):
            stream = _bound_unix(target)
        else:
            stream = _bound_host(target)
            target = HostAddress(target.scheme, target.host, stream.getsockname()[1])
    except OSError as error:
        raise ConfigError(f"cannot listen at {address}: {error.strerror or error}") from error
    return Listener(
        stream,
        str(target),
        context=_context(target, security, accepting=True),
        plain_peer=_plain_peer(target),
        handshake_s=handshake_s,
        unacked_s=unacked_s,
    )


def dial(
    address: str, security: Security, *, timeout_s: float, unacked_s: float = UNACKED_S
) -> Channel:
    """Connect to the listener at `address`, which has accepted this side when it returns.

    Raises ConfigError as `listen` does, PeerLost if nobody answers within `timeout_s`, and
    PeerRefused if either side refuses the other.
    """
    target = _allowed(parse_address(address), security)
    raw = _connected(target, timeout_s)
    try:
        tune(raw, unacked_s)
        stream = wrap(raw, _context(target, security, accepting=False), accepting=False)
    except OSError as error:
        raw.close()
        raise PeerLost(f"{address}: the connection broke: {error.strerror or error}") from error
    try:
        return Channel(
            stream, shake_hands(stream, accepting=False, timeout_s=timeout_s) or _plain_peer(target)
        )
    except (PeerLost, PeerRefused) as error:
        stream.close()
        raise type(error)(f"{address}: {error.message}") from error


def _allowed(target: UnixAddress | HostAddress, security: Security) -> UnixAddress | HostAddress:
    if target.scheme == "tls" and isinstance(security, LocalOnly):
        raise ConfigError(
            f"{target} needs a certificate of the cluster, and this process has none: "
            "`shoal head` makes the first, `shoal join` one on each other machine"
        )
    if target.scheme == "tls" and isinstance(security, Plaintext):
        raise ConfigError(
            f"{target} cannot be used with --insecure-plaintext: leave the option out"
        )
    if target.scheme == "tcp" and not isinstance(security, Plaintext):
        raise ConfigError(
            f"{target} is neither encrypted nor does it check who connects: use tls:HOST:PORT; "
            "to measure what encryption costs, --insecure-plaintext"
        )
    return target


def _context(
    target: UnixAddress | HostAddress, security: Security, *, accepting: bool
) -> ssl.SSLContext | None:
    if target.scheme != "tls" or not isinstance(security, MutualTls):
        return None
    identity = security.identity
    return identity.server_context if accepting else identity.client_context


def _plain_peer(target: UnixAddress | HostAddress) -> str:
    return _LOCAL_PEER if target.scheme == "unix" else _PLAINTEXT_PEER


def _check_folder(folder: Path) -> None:
    """Only this user may enter it: that is all that protects a unix socket."""
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & _OTHERS:
        raise ConfigError(
            f"others may enter {folder} (mode {stat.S_IMODE(status.st_mode):o}, owner "
            f"{status.st_uid}): sockets need a folder of your own of mode 700"
        )


def _bound_unix(target: UnixAddress) -> socket.socket:
    folder = Path(target.path).parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_folder(folder)
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.bind(target.path)
        stream.listen(_BACKLOG)
    except OSError:
        stream.close()
        raise
    return stream


def _bound_host(target: HostAddress) -> socket.socket:
    family, _, _, _, where = socket.getaddrinfo(
        target.host, target.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return socket.create_server(where[:2], family=family, backlog=_BACKLOG)


def _connected(target: UnixAddress | HostAddress, timeout_s: float) -> socket.socket:
    try:
        if isinstance(target, HostAddress):
            return socket.create_connection((target.host, target.port), timeout=timeout_s)
        _check_folder(Path(target.path).parent)
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.settimeout(timeout_s)
            stream.connect(target.path)
        except OSError:
            stream.close()
            raise
        return stream
    except OSError as error:
        raise PeerLost(
            f"{target} cannot be reached within {timeout_s} s: {error.strerror or error}"
        ) from error
