"""What bytes one token stands for, whatever way its tokenizer spells them."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE_MARK = "▁"
_WORD_PIECE = "##"


class TokenSpelling:
    def __init__(self, backend: Backend) -> None:
        # The decoder's state is its JSON; that of the whole tokenizer takes a second to write.
        state = backend.decoder.__getstate__() if backend.decoder is not None else b"null"
        decoders = _decoder_types(json.loads(state))
        self._backend = backend
        self._added = {
            token_id: token.content
            for token_id, token in backend.get_added_tokens_decoder().items()
        }
        self._byte_of_char = _byte_of_char() if "ByteLevel" in decoders else None
        self._word_pieces = "WordPiece" in decoders
        self.byte_tokens = frozenset(
            token_id
            for byte in range(256)
            if "ByteFallback" in decoders
            and (token_id := backend.token_to_id(f"<0x{byte:02X}>")) is not None
        )

    def bytes_of(self, token_id: int) -> bytes:
        """Empty for an id without a token, as the padding of a vocabulary has."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_of_char is not None:
            return b"".join(self._char_bytes(char) for char in token)
        if token_id in self.byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        if self._word_pieces:
            joined = token.startswith(_WORD_PIECE)
            return (token.removeprefix(_WORD_PIECE) if joined else f" {token}").encode()
        return token.replace(_SPACE_MARK, " ").encode()

    def _char_bytes(self, char: str) -> bytes:
        byte = (self._byte_of_char or {}).get(char)
        return char.encode() if byte is None else bytes((byte,))


def _decoder_types(decoder: dict[str, Any] | None) -> frozenset[str]:
    if decoder is None:
        return frozenset()
    inner = [_decoder_types(part) for part in decoder.get("decoders", [])]
    return frozenset({decoder["type"]}).union(*inner)


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte stands for itself, the others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }
