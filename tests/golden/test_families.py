"""Each family's logits against transformers on the same random weights.

Measured in float32: the largest error of any case is 4.1e-5 (YaRN with an attention factor of
1.7), of the others 1.5e-5, at logits of up to 9.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tiny_checkpoints import CONFIGS, computed, randomise

from shoal.compute.linear import Scheme
from shoal.models.config import decoder_config
from shoal.weights.safetensors_file import SafetensorsFolder


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name, golden):
    case = golden(name)
    logits_TV = computed(SafetensorsFolder(case.folder), case.tokens_T)
    error = (logits_TV - case.logits_TV).abs().max().item()
    print(f"{name}: max error {error:.1e}, largest logit {case.logits_TV.abs().max():.1f}")
    assert logits_TV.dtype == torch.float32
    assert error < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_bfloat16_is_as_close_to_float32_as_that_of_transformers(name, golden):
    case = golden(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.bfloat16)
    theirs_TV = theirs(case.tokens_T[None], use_cache=False).logits[0].float()
    ours_TV = computed(SafetensorsFolder(case.folder), case.tokens_T, Scheme(dtype=torch.bfloat16))
    their_error = (theirs_TV - case.logits_TV).square().mean().sqrt().item()
    our_error = (ours_TV - case.logits_TV).square().mean().sqrt().item()
    print(f"{name}: RMS error {our_error:.3f}, that of transformers {their_error:.3f}")
    assert our_error < 1.25 * their_error


@torch.inference_mode()
def test_the_text_model_of_a_multimodal_checkpoint(golden, tmp_path):
    text = json.loads((golden("gemma3").folder / "config.json").read_text())
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    tokens_T = golden("gemma3").tokens_T
    theirs_TV = model(tokens_T[None], use_cache=False).logits[0]
    error = (computed(SafetensorsFolder(tmp_path), tokens_T) - theirs_TV).abs().max().item()
    assert error < 1e-4


def test_the_older_spelling_of_a_configuration_means_the_same(golden):
    new = SafetensorsFolder(golden("gemma3-scaled").folder).config
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "layer_types")}
    old |= {
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }
    assert decoder_config(old) == decoder_config(new)
