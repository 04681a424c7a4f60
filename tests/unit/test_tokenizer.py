"""Tokenizers: special tokens, streams that equal the whole text, chat templates, files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import byte_fallback, byte_level, word_piece
from tokenizers import Tokenizer as Backend

from shoal.errors import InvalidRequest, SourceError, UnsupportedByModel
from shoal.weights.source import ModelFiles
from shoal.weights.tokenizer import SpecialTokens, Tokenizer, load_tokenizer

STYLES = {
    "byte_level": byte_level(),
    "gemma": byte_fallback(strips_first_space=False),
    "llama2": byte_fallback(strips_first_space=True),
}
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(style: str = "byte_level", template: str | None = None) -> Tokenizer:
    return Tokenizer(STYLES[style], SpecialTokens(named={"bos_token": "<s>"}), template)


@pytest.mark.parametrize("style", STYLES)
@given(data=st.data(), skip_special=st.booleans())
def test_streamed_pieces_join_to_the_whole_text(
    style: str, data: st.DataObject, skip_special: bool
) -> None:
    """Any ids: split characters, invalid bytes, special tokens between them, ids of no token."""
    one = tokenizer(style)
    tokens = ["<|im_end|>", "<eos>", "<0xC3>", "<0xA9>", "<0xFF>", "Ã", "©", "▁he", "▁", "he"]
    known = [STYLES[style].token_to_id(token) for token in tokens]
    tricky = [token_id for token_id in known if token_id is not None]
    any_id = st.integers(0, one.vocab_size) | st.sampled_from([*tricky, one.vocab_size])
    ids = data.draw(st.lists(any_id, max_size=20))
    stream = one.stream(skip_special=skip_special)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.flush() == one.decode(ids, skip_special=skip_special)
    assert stream.flush() == ""


@pytest.mark.parametrize("style", STYLES)
def test_text_comes_as_soon_as_its_characters_are_complete(style: str) -> None:
    one = tokenizer(style)
    stream = one.stream()
    pieces = [stream.push(token_id) for token_id in one.encode("hello h", add_special=False)]
    assert "".join(pieces) == one.decode(one.encode("hello h"))
    assert sum(bool(piece) for piece in pieces) >= 3


def test_half_a_character_waits_and_then_is_replaced() -> None:
    one = tokenizer()
    first, second = one.encode("ü")
    stream = one.stream()
    assert stream.push(first) == ""
    assert stream.push(second) == "ü"
    assert stream.push(first) == ""
    assert stream.flush() == "�"


@pytest.mark.parametrize("style", STYLES)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_text_survives_and_its_bytes_are_those_of_its_tokens(style: str, text: str) -> None:
    one = tokenizer(style)
    ids = one.encode(text, add_special=False)
    # SentencePiece spells a space with this character, and cannot tell them apart again.
    expected = text if style == "byte_level" else text.replace("▁", " ")
    assert b"".join(one.token_bytes(token_id) for token_id in ids) == expected.encode()
    if style != "llama2":
        assert one.decode(ids, skip_special=False) == expected


def test_token_texts() -> None:
    one = tokenizer()
    assert one.token_text(one.encode("hello")[0]) == "he"
    assert one.token_text(one.encode("ü")[0]) == "�"
    assert one.token_bytes(one.encode("ü")[0]) == "ü".encode()[:1]
    assert one.token_text(one.encode("<|im_end|>")[0]) == "<|im_end|>"
    assert one.token_bytes(999_999) == b""
    pieces = Tokenizer(word_piece(), SpecialTokens())
    assert [pieces.token_text(token_id) for token_id in (3, 4)] == [" he", "llo"]


def test_special_tokens_are_added_when_asked_for() -> None:
    gemma = tokenizer("gemma")
    bos = STYLES["gemma"].token_to_id("<bos>")
    assert gemma.encode("he") == [bos, *gemma.encode("he", add_special=False)]
    assert gemma.decode(gemma.encode("he")) == "he"
    assert gemma.decode(gemma.encode("he"), skip_special=False) == "<bos>he"


def test_a_training_setup_neither_cuts_nor_pads() -> None:
    assert Tokenizer(word_piece(), SpecialTokens()).encode("he he he he") == [1, 3, 3, 3, 3, 2]


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="character 2"):
        tokenizer().encode("ab\ud800")


def test_ids_that_are_none_are_refused() -> None:
    one = tokenizer()
    assert one.decode([999_999]) == ""
    for ids in ([-1], [2**40], ["a"]):
        with pytest.raises(InvalidRequest):
            one.decode(ids)  # type: ignore[arg-type]


def test_a_chat_template() -> None:
    one = tokenizer(template=CHATML)
    messages = [{"role": "user", "content": "hi {{ 1 + 1 }}"}]
    question = "<|im_start|>user\nhi {{ 1 + 1 }}<|im_end|>\n"
    assert one.has_chat_template
    assert one.apply_chat_template(messages) == f"{question}<|im_start|>assistant\n"
    assert one.apply_chat_template(messages, add_generation_prompt=False) == question


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ extra }}", "<s>more"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}]'),
        ("{% for m in messages %}{% break %}{% endfor %}done", "done"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}", "user"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% if tools is none %}\n  none\n{% endif %}", "  none\n"),
    ],
)
def test_what_templates_may_use(template: str, text: str) -> None:
    messages = [{"role": "user", "content": "<é>"}]
    assert tokenizer(template=template).apply_chat_template(messages, extra="more") == text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "messages"),
        ("{{ 'a' + messages[0].content }}", "concatenate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_what_templates_refuse_is_the_callers_error(template: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        tokenizer(template=template).apply_chat_template([{"role": "user", "content": None}])


def test_models_without_a_usable_template() -> None:
    assert not tokenizer().has_chat_template
    with pytest.raises(UnsupportedByModel, match="no chat template"):
        tokenizer().apply_chat_template([])
    with pytest.raises(UnsupportedByModel, match="broken"):
        tokenizer(template="{% if %}")


def model_folder(
    path: Path, backend: Backend, *, settings: dict[str, Any], **files: dict[str, Any]
) -> ModelFiles:
    backend.save(str(path / "tokenizer.json"))
    for name, content in {"tokenizer_config": settings, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return ModelFiles(name="m", kind="huggingface", path=path)


def test_end_tokens_come_from_all_files(tmp_path: Path) -> None:
    backend = byte_level()
    files = model_folder(
        tmp_path,
        backend,
        settings={"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|endoftext|>"},
        generation_config={"eos_token_id": [5, 6]},
        config={"eos_token_id": 7, "bos_token_id": 9},
    )
    loaded = load_tokenizer(files)
    named = {backend.token_to_id("<|endoftext|>"), backend.token_to_id("<|im_end|>")}
    assert loaded.eos_ids == named | {5, 6, 7}
    assert loaded.bos_id == backend.token_to_id("<|im_start|>")
    assert loaded.vocab_size == backend.get_vocab_size()
    assert not loaded.has_chat_template


@pytest.mark.parametrize("where", ["jinja", "json", "settings", "list"])
def test_chat_templates_lie_in_several_places(where: str, tmp_path: Path) -> None:
    inside: Any = {"settings": CHATML, "list": [{"name": "default", "template": CHATML}]}.get(where)
    files = model_folder(tmp_path, byte_level(), settings={"chat_template": inside})
    if where == "jinja":
        (tmp_path / "chat_template.jinja").write_text(CHATML)
    if where == "json":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    text = load_tokenizer(files).apply_chat_template([{"role": "user", "content": "x"}])
    assert text == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"


def test_a_damaged_tokenizer_is_a_source_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(ModelFiles(name="m", kind="huggingface", path=tmp_path))


@pytest.mark.slow
def test_a_tokenizer_json_needs_no_transformers(tmp_path: Path) -> None:
    model_folder(tmp_path, byte_level(), settings={})
    code = (
        "import sys; from pathlib import Path; from shoal.weights.source import ModelFiles; "
        "from shoal.weights.tokenizer import load_tokenizer; "
        "load_tokenizer(ModelFiles(name='m', kind='huggingface', path=Path(sys.argv[1]))); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0
