"""The head's join tokens in a file, which the head and `shoal token` change at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from filelock import FileLock

from shoal.errors import ConfigError
from shoal.fleet.state import StateFolder
from shoal.fleet.tokens import TokenRecord, TokenText, is_alive, record_of, spend

# Long enough for whoever comes with a dead token to hear why it is refused.
_KEEP_DEAD_S = 7 * 86400.0


class TokenStore:
    def __init__(self, folder: StateFolder) -> None:
        self._folder = folder
        self._lock = FileLock(folder.tokens.with_suffix(".lock"), mode=0o600)

    def add(self, text: TokenText, now_s: float, ttl_s: float, uses: int | None) -> TokenRecord:
        """Keep a token, as a hash, and forget those that died long ago. Raises ConfigError."""
        record = record_of(text, now_s, ttl_s, uses)
        with self._changing() as records:
            for other in list(records.values()):
                if not is_alive(other, now_s) and other.expires_s + _KEEP_DEAD_S < now_s:
                    del records[other.token_id]
            records[record.token_id] = record
        return record

    def alive(self, now_s: float) -> list[TokenRecord]:
        """Those that still let someone in, the soonest to expire first. Raises ConfigError."""
        records = [record for record in self._read().values() if is_alive(record, now_s)]
        return sorted(records, key=lambda record: record.expires_s)

    def revoke(self, token_id: str) -> None:
        """Raises ConfigError if there is no such token."""
        with self._changing() as records:
            if records.pop(token_id, None) is None:
                raise ConfigError(f"there is no token '{token_id}': see 'shoal token list'")

    @contextmanager
    def spending(self, token_id: str, secret: str, now_s: float) -> Iterator[None]:
        """Use a token once, unless what happens inside fails. Raises PeerRefused."""
        with self._changing() as records:
            spent = spend(records.get(token_id), secret, now_s)
            yield
            records[token_id] = spent

    @contextmanager
    def _changing(self) -> Iterator[dict[str, TokenRecord]]:
        self._folder.create()
        with self._lock:
            records = self._read()
            yield records
            self._folder.write(self._folder.tokens, msgspec.json.encode(list(records.values())))

    def _read(self) -> dict[str, TokenRecord]:
        path = self._folder.tokens
        try:
            records = msgspec.json.decode(path.read_bytes(), type=list[TokenRecord])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"{path} cannot be used: {error}; remove it") from error
        return {record.token_id: record for record in records}
