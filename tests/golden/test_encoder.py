"""BERT's hidden states against transformers on the same random weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_checkpoints import VOCAB_SIZE, randomise

from shoal.compute.linear import Scheme
from shoal.weights.loader import load_encoder
from shoal.weights.safetensors_file import SafetensorsFolder


@torch.inference_mode()
@pytest.mark.parametrize("model_class", [transformers.BertModel, transformers.BertForMaskedLM])
def test_hidden_states_equal_those_of_transformers(model_class, tmp_path):
    """Measured: max error 1.2e-6."""
    config = transformers.BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=72,
        intermediate_size=100,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=64,
    )
    model = model_class(config).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    trunk = getattr(model, "bert", model)
    lengths = [13, 1, 26]
    tokens_T = torch.randint(
        VOCAB_SIZE, (sum(lengths),), generator=torch.Generator().manual_seed(1)
    )
    theirs_TE = torch.cat(
        [trunk(tokens[None]).last_hidden_state[0] for tokens in tokens_T.split(lengths)]
    )
    ours_TE = load_encoder(SafetensorsFolder(tmp_path), scheme=Scheme())(tokens_T.tolist(), lengths)
    error = (ours_TE - theirs_TE).abs().max().item()
    print(f"max error {error:.1e}")
    assert error < 1e-5
