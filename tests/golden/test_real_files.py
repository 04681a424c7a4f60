"""The catalogue's files: tensors, configs and tokenizers equal what transformers makes of them.

Gemma 3's tensors and config were equal too, in 71 s: test_real_models compares its logits instead.
"""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers

from shoal.weights.source import ModelFiles, open_source, resolve, terms, terms_of
from shoal.weights.tokenizer import load_tokenizer

GGUF_MODELS = ["smollm2-135m", "gemma3-270m"]
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\tand\ttabs\n\n\nlines\r\n",
    "The year 2026, 3.14159, 1,000,000 and 0x1F600",
    "naïve café, Ünïcödé, ﬁne — “quotes” … ½",
    "Zażółć gęślą jaźń. Съешь ещё этих мягких. 我能吞下玻璃。 日本語のテキスト 한국어",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดี",
    "😀 👩‍👩‍👧‍👦 🇫🇷 e\u0301 \u200b \ufeff \x00 \x7f",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}  # done\n",
    "<|im_start|>user\nhi<|im_end|> <bos> <eos> <start_of_turn> [CLS] [MASK] <unk>",
    "▁ ▁▁ Ġ Ċ ## �",
    "a" * 3000,
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    wide = "".join(map(chr, range(32, 900)))
    alphabets = ["abc ABC,.", "éüñ漢字かな ", "0123 \n\t", "😀🎉 x", wide]
    return ["".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 60))) for _ in range(count)]


@pytest.mark.slow
def test_tensors_and_config_of_a_gguf_file() -> None:
    files = resolve("smollm2-135m")
    source = open_source(files)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        files.path.parent, gguf_file=files.path.name, dtype=torch.float32
    )
    theirs = model.state_dict()
    if source.config["tie_word_embeddings"]:
        del theirs["lm_head.weight"]
    assert source.names() == theirs.keys()
    for tensor_name, expected in theirs.items():
        assert torch.equal(source.dense(tensor_name).float(), expected), tensor_name
        packed = source.affine4(tensor_name)
        assert packed is None or torch.equal(packed.dense(), expected), tensor_name
    same = source.config.keys() & model.config.to_dict().keys() - {"architectures", "rope_scaling"}
    assert len(same) >= 14
    for key in same:
        assert source.config[key] == getattr(model.config, key), key


def transformers_tokenizer(name: str, files: ModelFiles) -> Any:
    if files.kind == "huggingface":
        return transformers.AutoTokenizer.from_pretrained(files.path)
    # The class that AutoTokenizer finds by itself, after 25 s.
    auto = transformers.AutoTokenizer if name != "gemma3-270m" else transformers.GemmaTokenizer
    return auto.from_pretrained(files.path.parent, gguf_file=files.path.name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*GGUF_MODELS, "minilm-l6"])
def test_tokens_and_texts_of_a_tokenizer(name: str) -> None:
    files = resolve(name)
    ours = load_tokenizer(files)
    theirs = transformers_tokenizer(name, files)
    for text in TEXTS + random_texts(300):
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids, text
        plain = ours.encode(text, add_special=False)
        assert plain == theirs(text, add_special_tokens=False).input_ids, text
        if name != "minilm-l6":
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
            stream = ours.stream()
            assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids), text
            assert b"".join(map(ours.token_bytes, plain)).decode() == ours.decode(
                plain, skip_special=False
            )
    assert ours.vocab_size == len(theirs)
    if name in GGUF_MODELS:
        assert ours.bos_id == theirs.bos_token_id
        assert theirs.eos_token_id in ours.eos_ids


@pytest.mark.slow
def test_chats_are_written_as_transformers_writes_them() -> None:
    files = resolve("smollm2-135m")
    ours = load_tokenizer(files)
    theirs = transformers.AutoTokenizer.from_pretrained(
        files.path.parent, gguf_file=files.path.name
    )
    user, system = {"role": "user", "content": " hi\n"}, {"role": "system", "content": "Be brief"}
    answer = {"role": "assistant", "content": "<b>é</b>"}
    for messages in ([user], [system, user], [user, answer, user]):
        for prompt in (True, False):
            expected = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected
    assert ours.eos_ids == {2}
    gemma = load_tokenizer(resolve("gemma3-270m"))
    assert gemma.eos_ids == {1, 106}
    assert not gemma.has_chat_template


@pytest.mark.slow
def test_a_second_start_needs_no_transformers() -> None:
    load_tokenizer(resolve("smollm2-135m"))
    code = (
        "import sys; from shoal.weights.source import open_source, resolve; "
        "from shoal.weights.tokenizer import load_tokenizer; files = resolve('smollm2-135m'); "
        "open_source(files); load_tokenizer(files); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_gemmas_terms_can_be_shown_before_and_after_it_is_fetched() -> None:
    text = terms(resolve("gemma3-270m"))
    assert text is not None
    assert "Gemma Terms of Use" in text
    assert "<p>" not in text
    assert terms_of("gemma3-270m") == text
    assert terms_of("smollm2-135m") is None
