"""Hugging Face folders: one file or shards, slices, bytes read, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shoal.errors import SourceError, UnsupportedModel
from shoal.weights.safetensors_file import SafetensorsFolder

TENSORS = {
    "a": torch.arange(96, dtype=torch.float32).view(8, 12),
    "b": torch.arange(6, dtype=torch.bfloat16),
    "c": torch.arange(24, dtype=torch.float16).view(4, 6),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_slices_keep_their_type_and_cost_only_their_bytes(
    layout: str, request: pytest.FixtureRequest
) -> None:
    source = SafetensorsFolder(request.getfixturevalue(layout))
    assert source.names() == {"a", "b", "c"}
    assert source.shape("a") == (8, 12)
    part = source.dense("a", slice(2, 4), slice(3, 6))
    assert torch.equal(part, TENSORS["a"][2:4, 3:6])
    assert source.bytes_read == 2 * 3 * 4
    assert torch.equal(source.dense("b", slice(1, 3)), TENSORS["b"][1:3])
    assert torch.equal(source.dense("c", None, slice(0, 2)), TENSORS["c"][:, :2])
    assert source.affine4("a") is None
    with pytest.raises(SourceError, match="no tensor named x"):
        source.dense("x")


def test_a_shard_that_is_not_needed_is_not_opened(sharded: Path) -> None:
    (sharded / "two.safetensors").write_bytes(b"damaged")
    source = SafetensorsFolder(sharded)
    assert torch.equal(source.dense("a"), TENSORS["a"])
    with pytest.raises(SourceError, match=r"two\.safetensors is damaged"):
        source.dense("b")


def test_missing_shards_are_named(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(SourceError, match=r"lacks two\.safetensors"):
        SafetensorsFolder(sharded)


def test_an_index_that_names_what_a_shard_lacks(sharded: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "z": "one.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match="lacks z, which the index names"):
        SafetensorsFolder(sharded).dense("z")


def test_a_truncated_file(single: Path) -> None:
    whole = (single / "model.safetensors").read_bytes()
    (single / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(SourceError, match="truncated"):
        SafetensorsFolder(single)


def test_pickled_weights_are_refused_with_advice(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    with pytest.raises(SourceError, match="save_pretrained"):
        SafetensorsFolder(single)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_bad_config(text: str | None, single: Path) -> None:
    (single / "config.json").unlink()
    if text is not None:
        (single / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"config\.json"):
        SafetensorsFolder(single)


def test_weights_quantised_by_others_are_refused(single: Path) -> None:
    (single / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(UnsupportedModel, match="gptq"):
        SafetensorsFolder(single)
