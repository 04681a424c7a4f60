"""A machine's membership in a cluster, as it lies on disk: who it is, and its secrets."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from shoal.errors import ConfigError

STATE_VARIABLE = "SHOAL_STATE"
DEFAULT_PORT = 8470
# As a certificate and a label of Ray can hold it.
NODE_NAME = r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?\Z"


class Membership(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`address` is where others reach this node, `head_address` where it reaches the head.

    `port` is the head's for enrolment; Ray has the two after it.
    """

    cluster: str
    node: str
    address: str
    head_address: str
    port: int

    @property
    def is_head(self) -> bool:
        return self.address == self.head_address

    @property
    def ray_port(self) -> int:
        return self.port + 1

    @property
    def ray_client_port(self) -> int:
        return self.port + 2

    @property
    def ray_address(self) -> str:
        return bracketed(self.head_address, self.ray_port)


@dataclass(frozen=True)
class StateFolder:
    """Where everything lies; only its owner may enter. `authority` and `tokens` are the head's."""

    path: Path

    @property
    def identity(self) -> Path:
        return self.path / "identity"

    @property
    def authority(self) -> Path:
        return self.path / "authority"

    @property
    def tokens(self) -> Path:
        return self.path / "tokens.json"

    @property
    def nodes(self) -> Path:
        return self.path / "nodes.json"

    @property
    def ray_token(self) -> Path:
        return self.path / "ray-token"

    @property
    def ray_storage(self) -> Path:
        return self.path / "ray-storage"

    @property
    def ray_log(self) -> Path:
        return self.path / "ray.log"

    @property
    def serving(self) -> Path:
        return self.path / "serving"

    def create(self) -> None:
        """Raises ConfigError."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be made: {error.strerror}; name another folder with --state"
            ) from error

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps others from running the same node. Raises ConfigError if one does."""
        self.create()
        lock = FileLock(self.path / "running.lock", mode=0o600)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"'shoal head' or 'shoal join' runs with {self.path} already: stop it first, or "
                "name another folder with --state"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def find(self) -> Membership | None:
        """None if this machine was never in a cluster. Raises ConfigError."""
        path = self.path / "cluster.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=Membership)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"{path} cannot be used: {error}; repair or remove it") from error

    def load(self) -> Membership:
        """Raises ConfigError if this machine is in no cluster."""
        membership = self.find()
        if membership is None:
            raise ConfigError(
                f"this machine is in no cluster ({self.path} says nothing): run 'shoal head' to "
                "begin one, or 'shoal join' with the line that 'shoal head' printed elsewhere"
            )
        return membership

    def save(self, membership: Membership) -> None:
        """Raises ConfigError."""
        self.write(self.path / "cluster.json", msgspec.json.encode(membership))

    def write(self, path: Path, data: bytes) -> None:
        """Whole or not at all, and readable by the owner alone. Raises ConfigError."""
        self.create()
        try:
            handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.name)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(draft).replace(path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error

    def scratch(self) -> Path:
        """A short-named folder of this owner for Ray's files. Raises ConfigError.

        Not inside the state: a unix socket's path has room for 107 bytes. A folder in a folder:
        Ray opens the one it is given to every user.
        """
        digest = hashlib.sha256(str(self.path.absolute()).encode()).hexdigest()[:10]
        folder = Path(tempfile.gettempdir()) / f"shoal-{digest}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise ConfigError(f"{folder} is not this user's alone: remove it")
        return folder / "ray"


def state_folder(
    chosen: Path | None = None, environ: Mapping[str, str] = os.environ
) -> StateFolder:
    """`chosen`, else $SHOAL_STATE, else where this platform keeps the state of programs."""
    if chosen or environ.get(STATE_VARIABLE):
        return StateFolder((chosen or Path(environ[STATE_VARIABLE])).expanduser().absolute())
    if environ.get("XDG_STATE_HOME"):
        return StateFolder(Path(environ["XDG_STATE_HOME"]) / "shoal" / "cluster")
    by_platform = {"darwin": "Library/Application Support"}
    base = Path.home() / by_platform.get(sys.platform, ".local/state")
    return StateFolder(base / "shoal" / "cluster")


def check_node_name(name: str) -> None:
    """Raises ConfigError."""
    if re.match(NODE_NAME, name) is None:
        raise ConfigError(
            f"{name!r} cannot name a node: give one with --name, of up to 63 letters, digits, "
            "dots, hyphens and underscores, a letter or digit at either end"
        )


def bracketed(host: str, port: int) -> str:
    """`host:port`, with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
