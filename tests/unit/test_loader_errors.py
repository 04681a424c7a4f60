"""A checkpoint that does not fit is refused with every reason, before its data is read."""

from __future__ import annotations

import re

import pytest
import torch
from msgspec import structs

from shoal.compute.affine import Affine4
from shoal.compute.linear import Scheme
from shoal.errors import InternalError, SourceError
from shoal.models.config import decoder_config
from shoal.parallel.communicator import Solo
from shoal.parallel.partition import Span, whole_shard
from shoal.weights.inventory import decoder_shapes
from shoal.weights.loader import load_decoder
from shoal.weights.parts import Parts

CONFIG = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


SLICE_OF_THREE_KV_HEADS = structs.replace(
    whole_shard(decoder_config(CONFIG).dims).slice, kv_heads=Span(0, 3)
)


class MemorySource:
    """Tensors of given shapes; refuses to be read where a test says nothing may be."""

    def __init__(self, shapes, config=CONFIG, readable=False) -> None:
        self.config = dict(config)
        self.bytes_read = 0
        self.shapes = shapes
        self.readable = readable

    def names(self):
        return frozenset(self.shapes)

    def shape(self, name):
        return self.shapes[name]

    def dense(self, name, rows=None, columns=None):
        assert self.readable, f"{name} was read"
        tensor = torch.ones(self.shapes[name])[rows or slice(None)]
        return tensor if columns is None else tensor[:, columns]

    def affine4(self, *_):
        return None

    def close(self):
        pass


def checkpoint_shapes():
    shapes = decoder_shapes(decoder_config(CONFIG))
    return {f"model.{name}": shape for name, shape in shapes.items()}


def load(source, **changes):
    config = decoder_config(source.config)
    shard = structs.replace(whole_shard(config.dims), **changes)
    return load_decoder(source, shard, scheme=Scheme(), communicator=Solo())


def test_every_missing_spare_and_misshapen_tensor_is_listed():
    shapes = checkpoint_shapes()
    del shapes["model.norm.weight"]
    del shapes["model.layers.1.mlp.up_proj.weight"]
    shapes["model.layers.0.self_attn.k_proj.weight"] = (33, 64)
    shapes["model.layers.0.self_attn.q_proj.bias"] = (64,)
    with pytest.raises(SourceError) as caught:
        load(MemorySource(shapes))
    lines = caught.value.message.split("\n  ")
    assert "(4 tensors)" in lines[0]
    assert sorted(lines[1:]) == [
        "misshapen: model.layers.0.self_attn.k_proj.weight is (33, 64), must be (32, 64)",
        "missing: model.layers.1.mlp.up_proj.weight (96, 64)",
        "missing: model.norm.weight (64,)",
        "spare: model.layers.0.self_attn.q_proj.bias (64,)",
    ]


def test_harmless_spares_are_ignored():
    shapes = checkpoint_shapes()
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (8,)
    shapes["lm_head.weight"] = (20, 64)
    assert load(MemorySource(shapes, readable=True)).shard.is_last


def test_a_shard_needs_only_its_own_tensors():
    shapes = {
        name: shape for name, shape in checkpoint_shapes().items() if ".layers.0." not in name
    }
    assert load(MemorySource(shapes, readable=True), layers=Span(1, 2)).shard.is_last
    with pytest.raises(SourceError, match=re.escape("model.layers.0.mlp.down_proj.weight")):
        load(MemorySource(shapes), layers=Span(0, 1))


def test_an_untied_head_must_be_there():
    source = MemorySource(checkpoint_shapes(), CONFIG | {"tie_word_embeddings": False})
    with pytest.raises(SourceError, match=r"missing: lm_head.weight \(20, 64\)"):
        load(source)


def test_a_shard_holds_only_the_parts_of_its_place():
    decoder = load(MemorySource(checkpoint_shapes(), readable=True), layers=Span(0, 1))
    with pytest.raises(InternalError, match=r"layers \[0, 1\) of 2 holds no head"):
        decoder.logits(torch.ones(1, 64))


@pytest.mark.parametrize(
    "change", [{"layers": Span(1, 3)}, {"slice": SLICE_OF_THREE_KV_HEADS}, {"num_layers": 3}]
)
def test_a_shard_of_another_model_is_refused(change):
    with pytest.raises(InternalError, match=r"layers|KV heads"):
        load(MemorySource(checkpoint_shapes()), **change)


class PackedSource(MemorySource):
    """Holds every matrix but those named in `dense_names` in 4 bits."""

    dense_names = frozenset()

    def affine4(self, name, rows=None, columns=None):
        if name in self.dense_names:
            return None
        num_rows, num_columns = self.dense(name, rows, columns).shape
        groups = num_columns // 32
        return Affine4(
            torch.ones(num_rows, num_columns, dtype=torch.uint8),
            torch.full((num_rows, groups), 2.0),
            torch.full((num_rows, groups), 3.0),
        )


def stacked_weight(source, monkeypatch, few):
    seen = []
    monkeypatch.setattr("shoal.weights.parts.make_linear", lambda weight, *_: seen.append(weight))
    names = {"a.weight": "a.weight", "b.weight": "b.weight"}
    parts = Parts(source, names, Scheme(few=few))
    parts.linear(("a", Span(0, 2)), ("b", None))
    return seen[0]


def test_parts_that_are_all_4_bit_are_fused_in_4_bit(monkeypatch):
    source = PackedSource({"a.weight": (4, 32), "b.weight": (3, 32)}, readable=True)
    assert isinstance(stacked_weight(source, monkeypatch, "int4"), Affine4)
    assert isinstance(stacked_weight(source, monkeypatch, None), torch.Tensor)
    source.dense_names = frozenset({"b.weight"})
    mixed = stacked_weight(source, monkeypatch, "int4")
    assert mixed[:, 0].tolist() == [5.0, 5.0, 1.0, 1.0, 1.0]
