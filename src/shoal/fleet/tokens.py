"""Join tokens: what lets a new machine into a cluster, for a while or for a number of times.

`shoal-<id>.<secret>.<fingerprint>`: the head keeps only a hash of the secret, and the fingerprint
of its authority's certificate lets the joining side know the head before it says anything.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

import msgspec

from shoal.errors import ConfigError, PeerRefused

_TOKEN = re.compile(r"shoal-([0-9a-f]{8})\.([0-9a-f]{32})\.([0-9a-f]{64})")


class TokenRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the head keeps. Times are seconds since 1970; `uses_left` None is any number."""

    token_id: str
    secret_hash: str
    created_s: float
    expires_s: float
    uses_left: int | None


class TokenText(msgspec.Struct, frozen=True):
    """What the operator pastes."""

    token_id: str
    secret: str
    fingerprint: str

    def __str__(self) -> str:
        return f"shoal-{self.token_id}.{self.secret}.{self.fingerprint}"


def draw_token(fingerprint: str) -> TokenText:
    """A token nobody can guess: 128 random bits, so that a plain hash of them is safe to keep."""
    return TokenText(secrets.token_hex(4), secrets.token_hex(16), fingerprint)


def parse_token(text: str) -> TokenText:
    """Raises ConfigError."""
    match = _TOKEN.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            "this is not a whole join token (shoal-ID.SECRET.FINGERPRINT): paste all of the line "
            "that 'shoal head' or 'shoal token create' printed",
            param="token",
        )
    return TokenText(*match.groups())


def record_of(text: TokenText, now_s: float, ttl_s: float, uses: int | None) -> TokenRecord:
    """Raises ConfigError."""
    if ttl_s <= 0 or (uses is not None and uses < 1):
        raise ConfigError(f"a token must last and be used: not {ttl_s:g} s and {uses} uses")
    return TokenRecord(
        token_id=text.token_id,
        secret_hash=hash_secret(text.secret),
        created_s=now_s,
        expires_s=now_s + ttl_s,
        uses_left=uses,
    )


def hash_secret(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def is_alive(record: TokenRecord, now_s: float) -> bool:
    return now_s < record.expires_s and record.uses_left != 0


def spend(record: TokenRecord | None, secret: str, now_s: float) -> TokenRecord:
    """The record after one more use. Raises PeerRefused with what the joining side must do.

    Whether a token is expired or used up is told only to who knows its secret.
    """
    kept = record.secret_hash if record else hash_secret("")
    # Compared even if there is no record: an unknown id must not answer sooner than a known one.
    matches = hmac.compare_digest(kept, hash_secret(secret))
    if record is None or not matches:
        raise PeerRefused(f"the head knows no such token: {_WHAT_TO_DO}", code="unknown_token")
    if now_s >= record.expires_s:
        ago_s = now_s - record.expires_s
        raise PeerRefused(
            f"the token expired {ago_s:.0f} s ago: {_WHAT_TO_DO}", code="token_expired"
        )
    if record.uses_left == 0:
        raise PeerRefused(f"the token is used up: {_WHAT_TO_DO}", code="token_used")
    if record.uses_left is None:
        return record
    return msgspec.structs.replace(record, uses_left=record.uses_left - 1)


_WHAT_TO_DO = "run 'shoal token create' on the head's machine and join with what it prints"
