"""The catalogue's real models against transformers on the same files, in float32.

Measured, largest error: SmolLM2 6.5e-5 at logits of up to 37, Gemma 3 2.0e-4 at logits of up to
101, MiniLM 5.0e-6 in hidden states of up to 6.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_checkpoints import computed

from shoal.compute.linear import Scheme
from shoal.weights.loader import load_encoder
from shoal.weights.source import open_source, resolve


def tokens(count: int, below: int) -> torch.Tensor:
    return torch.randint(100, below, (count,), generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@torch.inference_mode()
# Gemma's windows of 512 tokens only show in a sequence longer than they are.
@pytest.mark.parametrize(("name", "num_tokens"), [("smollm2-135m", 100), ("gemma3-270m", 530)])
def test_logits_of_a_gguf_file(name, num_tokens, reference):
    files = resolve(name)
    source = open_source(files)
    tokens_T = tokens(num_tokens, source.config["vocab_size"])
    theirs_TV = reference(name)(tokens_T[None], use_cache=False).logits[0]
    ours_TV = computed(source, tokens_T)
    error = ours_TV.sub_(theirs_TV).abs_().max().item()
    print(f"{name}: max error {error:.1e}, largest logit {theirs_TV.abs().max():.1f}")
    assert error < 5e-4


@pytest.mark.slow
@torch.inference_mode()
def test_sentence_embeddings_of_minilm():
    files = resolve("minilm-l6")
    lengths = [6, 20, 300]
    tokens_T = tokens(sum(lengths), 30_000)
    model = transformers.AutoModel.from_pretrained(files.path, dtype=torch.float32).eval()
    encoder = load_encoder(open_source(files), scheme=Scheme())
    ours = encoder(tokens_T.tolist(), lengths).split(lengths)
    theirs = [model(part[None]).last_hidden_state[0] for part in tokens_T.split(lengths)]
    error = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    print(f"minilm-l6: max error {error:.1e}")
    assert error < 5e-5
    for a, b in zip(ours, theirs, strict=True):
        assert torch.cosine_similarity(a.mean(0), b.mean(0), dim=0) > 1 - 1e-6
