"""A model's tokenizer from its files. transformers converts what has no tokenizer.json, once."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from shoal.errors import SourceError
from shoal.weights.cache import Progress, cache_root, locked, silent
from shoal.weights.safetensors_file import read_json
from shoal.weights.source import ModelFiles, open_source

TOKENIZER = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_OLD_TEMPLATE = "chat_template.json"
_DEFAULT_TEMPLATE = "default"
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Ends of a turn that config files of chat models often leave out of their end tokens.
_TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """`named` are the tokens a chat template may use, such as bos_token."""

    bos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    named: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    backend: Backend
    special: SpecialTokens
    chat_template: str | None


def read_tokenizer(files: ModelFiles, report: Progress = silent) -> TokenizerFiles:
    """Raises SourceError when the files hold no tokenizer that can be read."""
    if files.kind == "huggingface" and (files.path / TOKENIZER).is_file():
        folder = files.path
    else:
        folder = _converted(files, report)
    try:
        backend = Backend.from_file(str(folder / TOKENIZER))
    except Exception as error:
        # tokenizers raises plain Exception for a file it cannot read.
        raise SourceError(f"{folder / TOKENIZER} cannot be read: {error}") from error
    settings = _json_or_empty(folder / _SETTINGS)
    special = _special_tokens(backend, settings, list(_configs(files)))
    return TokenizerFiles(backend, special, _chat_template(folder, settings))


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    if (folder / _TEMPLATE).is_file():
        return (folder / _TEMPLATE).read_text(encoding="utf-8")
    template = _json_or_empty(folder / _OLD_TEMPLATE).get("chat_template")
    template = template or settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get(_DEFAULT_TEMPLATE)
    return template if isinstance(template, str) else None


def _special_tokens(
    backend: Backend, settings: dict[str, Any], configs: list[dict[str, Any]]
) -> SpecialTokens:
    named = {name: text for name in _NAMED if (text := _content(settings.get(name))) is not None}
    special_ids = {
        token.content: token_id
        for token_id, token in backend.get_added_tokens_decoder().items()
        if token.special
    }
    eos_ids = {special_ids[text] for text in _TURN_ENDS if text in special_ids}
    if "eos_token" in named and (eos_id := backend.token_to_id(named["eos_token"])) is not None:
        eos_ids.add(eos_id)
    bos_id = backend.token_to_id(named["bos_token"]) if "bos_token" in named else None
    for config in configs:
        eos_ids.update(_ids(config.get("eos_token_id")))
        bos_id = next(iter(_ids(config.get("bos_token_id"))), None) if bos_id is None else bos_id
    return SpecialTokens(bos_id, frozenset(eos_ids), named)


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [token_id for token_id in values if isinstance(token_id, int)]


def _content(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _configs(files: ModelFiles) -> Iterator[dict[str, Any]]:
    if files.kind == "gguf":
        source = open_source(files)
        source.close()
        yield source.config
    else:
        yield _json_or_empty(files.path / "generation_config.json")
        yield _json_or_empty(files.path / "config.json")


def _json_or_empty(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _converted(files: ModelFiles, report: Progress) -> Path:
    """The cache's folder with the tokenizer in the form tokenizers reads fast."""
    root = cache_root() / "tokenizers"
    folder = root / _identity(files.path)
    if (folder / TOKENIZER).is_file():
        return folder
    with locked(root / f"{folder.name}.lock", report):
        if not (folder / TOKENIZER).is_file():
            report(f"converting the tokenizer of {files.name}, once", 0, None)
            _convert(files, root, folder)
    return folder


def _identity(path: Path) -> str:
    """Of these very files, converted by this very version."""
    stat = path.stat()
    facts = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    facts.append(importlib.metadata.version("transformers"))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _convert(files: ModelFiles, root: Path, folder: Path) -> None:
    part = Path(tempfile.mkdtemp(dir=root))
    try:
        _from_transformers(files).save_pretrained(str(part))
        if not (part / TOKENIZER).is_file():
            raise ValueError("it has no fast form")
        part.rename(folder)
    except Exception as error:
        # transformers raises nearly every kind of error for a tokenizer it cannot build.
        shutil.rmtree(part, ignore_errors=True)
        raise SourceError(
            f"no tokenizer can be made from {files.path}: {type(error).__name__}: {error}"
        ) from error


def _from_transformers(files: ModelFiles) -> Any:
    # Takes 1 to 4 s to import, and is needed only for the first load of a model.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: PLC0415

    if files.kind == "huggingface":
        return AutoTokenizer.from_pretrained(str(files.path), local_files_only=True)
    # AutoTokenizer makes the same tokenizer, but reads the whole header twice to name its class:
    # 28 s against 4 s for Gemma 3.
    return PreTrainedTokenizerFast.from_pretrained(
        str(files.path.parent), gguf_file=files.path.name, local_files_only=True
    )
