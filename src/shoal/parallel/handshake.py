"""The first moments of a connection: TLS with both certificates, then a preamble from each side.

The preambles make a peer that speaks something else known at once, on both sides.
"""

from __future__ import annotations

import socket
import ssl
import time

from shoal.errors import PeerLost, PeerRefused
from shoal.parallel.frames import VERSION
from shoal.parallel.identity import peer_name

PREAMBLE = b"SHOAL/%d\n" % VERSION


def wrap(
    stream: socket.socket, context: ssl.SSLContext | None, *, accepting: bool
) -> socket.socket:
    """`stream`, with TLS around it if there is a context; nothing is sent yet."""
    if context is None:
        return stream
    return context.wrap_socket(stream, server_side=accepting, do_handshake_on_connect=False)


def shake_hands(stream: socket.socket, *, accepting: bool, timeout_s: float) -> str | None:
    """The peer's node name, or None without TLS. Raises PeerRefused, PeerLost."""
    end_s = time.monotonic() + timeout_s
    try:
        stream.settimeout(timeout_s)
        if not isinstance(stream, ssl.SSLSocket):
            # The dialler speaks first, as it would in TLS: a listener that expects TLS must not
            # wait in vain.
            _exchange_preambles(stream, speaks_first=not accepting, end_s=end_s)
            return None
        stream.do_handshake()
        name = peer_name(stream.getpeercert(binary_form=True) or b"")
        # The dialler listens first: only now does it learn that its certificate was refused, and
        # what it had sent would cut the alert short.
        _exchange_preambles(stream, speaks_first=accepting, end_s=end_s)
        return name
    except ssl.SSLCertVerificationError as error:
        raise PeerRefused(f"its certificate is not accepted: {error.verify_message}") from error
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
        raise PeerLost("it hung up during the handshake") from error
    except ssl.SSLError as error:
        raise PeerRefused(_explain(error)) from error
    except TimeoutError as error:
        raise PeerLost(f"the handshake was not done within {timeout_s} s") from error
    except OSError as error:
        raise PeerLost(f"it hung up during the handshake: {error.strerror or error}") from error


def _exchange_preambles(stream: socket.socket, *, speaks_first: bool, end_s: float) -> None:
    if speaks_first:
        stream.sendall(PREAMBLE)
    theirs = b""
    while len(theirs) < len(PREAMBLE):
        stream.settimeout(max(end_s - time.monotonic(), 1e-3))
        piece = stream.recv(len(PREAMBLE) - len(theirs))
        if not piece:
            raise ConnectionError("the connection was closed")
        theirs += piece
    if not speaks_first:
        stream.sendall(PREAMBLE)
    if theirs != PREAMBLE:
        raise PeerRefused(f"it begins with {theirs!r} instead of {PREAMBLE!r}: {_guess(theirs)}")


def _guess(theirs: bytes) -> str:
    if theirs[0] in b"\x15\x16":
        return "it speaks TLS, and this side was told not to"
    if theirs.startswith(PREAMBLE[:6]):
        return "it runs another version of Shoal"
    return "it is not Shoal"


def _explain(error: ssl.SSLError) -> str:
    reason = error.reason or str(error)
    if "ALERT" in reason:
        return f"it refused this node's certificate ({reason})"
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "it showed no certificate"
    return f"it does not speak TLS 1.3 as asked, perhaps no TLS at all ({reason})"
