"""Configurations are parsed to what they mean, and refused with what is wrong."""

from __future__ import annotations

import pytest

from shoal.errors import SourceError, UnsupportedModel
from shoal.models.config import decoder_config, encoder_config
from shoal.models.registry import model_kind
from shoal.models.rope_config import (
    DefaultRope,
    FactorsRope,
    LinearRope,
    Llama3Rope,
    YarnRope,
)

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# As google/gemma-3-4b-it publishes it: most keys are left to the family's defaults.
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "num_attention_heads": 16},
}


def windows(config):
    return [layer.window for layer in decoder_config(config).layers]


def ropes(config):
    return {layer.rope for layer in decoder_config(config).layers}


def test_sizes_that_are_left_out_are_derived():
    config = decoder_config({**LLAMA, "num_key_value_heads": None, "head_dim": None})
    assert (config.num_kv_heads, config.head_dim, config.dims.group_size) == (8, 8, 1)
    assert config.attention_scale == pytest.approx(8**-0.5)
    assert not config.tied_head


def test_a_sparse_multimodal_configuration_gets_the_family_defaults():
    config = decoder_config(GEMMA_3_4B)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.vocab_size == 262_208
    assert config.tied_head
    assert config.activation == "gelu_tanh"
    assert config.embedding_scale == pytest.approx(2560**0.5)
    sliding, full = config.layers[0], config.layers[5]
    assert (sliding.window, sliding.rope) == (1024, DefaultRope(theta=10_000.0))
    assert (full.window, full.rope) == (None, LinearRope(theta=1_000_000.0, factor=8.0))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA | {"sliding_window": 9}, [None] * 3),
        (MISTRAL | {"sliding_window": 9}, [9] * 3),
        (MISTRAL | {"sliding_window": None}, [None] * 3),
        (QWEN2 | {"sliding_window": 9, "max_window_layers": 1}, [None] * 3),
        (
            QWEN2 | {"sliding_window": 9, "max_window_layers": 1, "use_sliding_window": True},
            [None, 9, 9],
        ),
    ],
)
def test_windows_slide_where_the_family_says(config, expected):
    assert windows(config) == expected


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, DefaultRope(theta=500.0)),
        ({"type": "linear", "factor": 2}, LinearRope(theta=500.0, factor=2.0)),
        (
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4},
            Llama3Rope(
                theta=500.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_context=4096,
            ),
        ),
        (
            {"type": "yarn", "factor": 4, "original_max_position_embeddings": 2048},
            YarnRope(theta=500.0, factor=4.0, original_context=2048),
        ),
        (
            {"rope_type": "freq_factors", "factors": [1, 2, 3, 4]},
            FactorsRope(theta=500.0, factors=(1.0, 2.0, 3.0, 4.0)),
        ),
    ],
)
def test_rope_variants_in_both_spellings(scaling, expected):
    old = LLAMA | {"rope_theta": 500.0, "rope_scaling": scaling}
    new = LLAMA | {"rope_parameters": {"rope_theta": 500.0, **(scaling or {})}}
    assert ropes(old) == ropes(new) == {expected}


def test_yarn_stretches_the_context():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert decoder_config(LLAMA | {"rope_scaling": scaling}).max_context == 4 * 4096


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "MixtralForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_act": "relu2"}, "relu2"),
    ],
)
def test_what_is_unsupported_is_named(change, named):
    with pytest.raises(UnsupportedModel, match=named):
        decoder_config(LLAMA | change)


def test_an_unknown_architecture_is_told_the_supported_ones():
    with pytest.raises(UnsupportedModel, match=r"RwkvModel.*LlamaForCausalLM.*BertModel"):
        model_kind({"architectures": ["RwkvModel"], "model_type": "rwkv"})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"num_key_value_heads": 3}, "3 KV heads"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ],
)
def test_a_broken_configuration_is_refused(change, named):
    with pytest.raises(SourceError, match=named):
        decoder_config(LLAMA | change)


def test_layer_types_must_name_every_layer():
    change = {"use_sliding_window": True, "layer_types": ["full_attention"]}
    with pytest.raises(SourceError, match="names 1 layers, the model has 3"):
        decoder_config(QWEN2 | change)


def test_encoders_and_decoders_are_told_apart():
    assert model_kind(BERT) == "encoder"
    assert model_kind(GEMMA_3_4B) == "decoder"
    assert model_kind({"model_type": "bert"}) == "encoder"
    assert encoder_config(BERT).max_context == 512
    with pytest.raises(UnsupportedModel, match="not an encoder"):
        encoder_config(LLAMA)
    with pytest.raises(UnsupportedModel, match="relative_key"):
        encoder_config(BERT | {"position_embedding_type": "relative_key"})
