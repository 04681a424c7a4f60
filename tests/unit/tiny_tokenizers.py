"""Tokenizers of the three styles that models use, small enough to build in a test."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

WORDS = ["▁he", "▁", "h", "e", "l", "o", "he", "llo", "▁▁", "é", "漢", ".", "�"]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen and SmolLM2: a token is any run of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    merges = [("h", "e"), ("l", "l"), ("ll", "o"), ("Ã", "©"), ("Ġ", "Ġ")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def byte_fallback(*, strips_first_space: bool) -> Tokenizer:
    """As Gemma, and with `strips_first_space` as Llama 2 and Mistral."""
    vocab = {"<unk>": 0}
    for token in (*(f"<0x{byte:02X}>" for byte in range(256)), *WORDS):
        vocab[token] = len(vocab)
    merges = [("h", "e"), ("▁", "he"), ("▁", "▁")]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strips_first_space:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    _add_special(tokenizer, ["<bos>", "<eos>", "<end_of_turn>"])
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT."""
    vocab = {token: i for i, token in enumerate(["[UNK]", "[CLS]", "[SEP]", "he", "##llo", "."])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.decoder = decoders.WordPiece("##")
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    return tokenizer


def _add_special(tokenizer: Tokenizer, texts: list[str]) -> None:
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in texts])
