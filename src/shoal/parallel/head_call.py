"""Calling the head: two connections, one for each direction."""

from __future__ import annotations

import msgspec

from shoal.parallel.channel import Channel
from shoal.parallel.control import Hello
from shoal.parallel.endpoint import Security, dial

_CONNECT_S = 20.0


def call_head(
    address: str, security: Security, hello: Hello, *, timeout_s: float = _CONNECT_S
) -> tuple[Channel, Channel]:
    """(down, up) for the service that `hello` names; its direction is filled in here.

    Raises PeerLost when the head cannot be reached, PeerRefused when it refuses us.
    """
    down = _call(address, security, msgspec.structs.replace(hello, direction="down"), timeout_s)
    try:
        up = _call(address, security, msgspec.structs.replace(hello, direction="up"), timeout_s)
        return down, up
    except BaseException:
        down.close()
        raise


def _call(address: str, security: Security, hello: Hello, timeout_s: float) -> Channel:
    channel = dial(address, security, timeout_s=timeout_s)
    channel.send(msgspec.msgpack.encode(hello))
    return channel
