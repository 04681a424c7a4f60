"""Text to tokens and back, and chat messages to text, as the model was trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

from shoal.errors import InvalidRequest, UnsupportedByModel
from shoal.weights.cache import Progress, silent
from shoal.weights.chat_template import ChatTemplate
from shoal.weights.source import ModelFiles
from shoal.weights.text_stream import TextStream
from shoal.weights.token_spelling import TokenSpelling
from shoal.weights.tokenizer_files import SpecialTokens, read_tokenizer

__all__ = ["SpecialTokens", "TextStream", "Tokenizer", "load_tokenizer"]


def load_tokenizer(files: ModelFiles, *, report: Progress | None = None) -> Tokenizer:
    """Raises SourceError when the files hold no tokenizer that can be read."""
    found = read_tokenizer(files, report or silent)
    return Tokenizer(found.backend, found.special, found.chat_template)


class Tokenizer:
    """Safe to use from several threads, but for the streams it makes."""

    def __init__(
        self, backend: Backend, special: SpecialTokens, chat_template: str | None = None
    ) -> None:
        # A tokenizer.json may ask for cutting and padding, which serve training batches.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._spelling = TokenSpelling(backend)
        self._special_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )
        self._template = ChatTemplate(chat_template, special.named) if chat_template else None
        self.bos_id = special.bos_id
        self.eos_ids = special.eos_ids
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    def has_tokens_of(self, other: Tokenizer) -> bool:
        """Whether an id means the same in both."""
        ours: dict[str, int] = self._backend.get_vocab()
        theirs: dict[str, int] = other._backend.get_vocab()
        return ours == theirs

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Raises InvalidRequest for text that is no Unicode (a lone surrogate)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the text holds half a surrogate pair at character {error.start}"
            ) from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Ids beyond the vocabulary give no text. Raises InvalidRequest for what is no id."""
        try:
            text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        except (OverflowError, TypeError) as error:
            raise InvalidRequest(f"token ids are integers from 0 on: {error}") from error
        return text

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Raises UnsupportedByModel without a template, InvalidRequest when it refuses."""
        if self._template is None:
            raise UnsupportedByModel(
                "this model has no chat template: it completes text, use the completions API"
            )
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, **variables
        )

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """Token by token; the pieces joined are `decode` of all ids."""

        def decode(ids: list[int]) -> str:
            return self.decode(ids, skip_special=skip_special)

        def is_silent(token_id: int) -> bool:
            if token_id in self._special_ids:
                return skip_special
            return self._backend.id_to_token(token_id) is None

        return TextStream(decode, is_silent=is_silent, byte_tokens=self._spelling.byte_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token adds to a text; part of a character, at times."""
        return self._spelling.bytes_of(token_id)

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with replacement characters where it is none."""
        return self.token_bytes(token_id).decode(errors="replace")
