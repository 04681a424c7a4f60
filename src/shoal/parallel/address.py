"""Where a process listens: `unix:/path`, `tls:HOST:PORT` or `tcp:HOST:PORT`. Pure values."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.errors import ConfigError

# The kernel keeps 108 bytes for a socket's path, with a zero at the end.
_MAX_PATH_BYTES = 107
_MAX_PORT = 65535


@dataclass(frozen=True)
class UnixAddress:
    path: str

    scheme = "unix"

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True)
class HostAddress:
    """`scheme` is "tls" or "tcp"; port 0 lets the system choose."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}:{host}:{self.port}"


def parse_address(text: str) -> UnixAddress | HostAddress:
    """Raises ConfigError."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix":
        return _unix(text, rest)
    host, _, port = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if scheme not in ("tls", "tcp") or not host or not port.isdecimal() or int(port) > _MAX_PORT:
        raise ConfigError(
            f"'{text}' is no address: write tls:HOST:PORT, tcp:HOST:PORT or unix:/path"
        )
    return HostAddress(scheme, host, int(port))


def _unix(text: str, path: str) -> UnixAddress:
    if not path.startswith("/") or len(path.encode()) > _MAX_PATH_BYTES:
        raise ConfigError(
            f"'{text}': a unix socket's path begins with / and has at most {_MAX_PATH_BYTES} "
            f"bytes, this has {len(path.encode())}"
        )
    return UnixAddress(path)
