"""Small models with real tensor names, and a head and workers that are ends of socket pairs."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Type
from gguf_samples import (
    HEAD_DIM,
    HIDDEN,
    MLP,
    NUM_HEADS,
    NUM_KV_HEADS,
    VOCAB,
    random_blocks,
    write_gguf,
)
from safetensors.torch import save_file

from shoal.errors import PeerLost
from shoal.models.config import decoder_config
from shoal.parallel.channel import Channel
from shoal.parallel.partition import Dims, Shard, Span, shards_of
from shoal.weights.fetch_shard import fetch_shard
from shoal.weights.inventory import decoder_shapes
from shoal.weights.provider import WeightsProvider
from shoal.weights.source import ModelFiles, resolve

NUM_LAYERS = 4
DIMS = Dims(
    num_layers=NUM_LAYERS,
    num_query_heads=NUM_HEADS,
    num_kv_heads=NUM_KV_HEADS,
    num_mlp_columns=MLP,
    vocab_size=VOCAB,
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
FIRST_HALF, SECOND_HALF, ALL = (
    shards_of(DIMS, layers, [1.0])[0] for layers in (Span(0, 2), Span(2, 4), Span(0, 4))
)


def make_model(layout: str, folder: Path) -> ModelFiles:
    """`layout` is "gguf", "single" or "sharded"."""
    folder.mkdir(parents=True)
    if layout == "gguf":
        return resolve(str(_gguf(folder / "tiny.gguf")))
    torch.manual_seed(0)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = {
        f"model.{name}".replace("model.lm_head", "lm_head"): torch.randn(shape).to(torch.bfloat16)
        for name, shape in decoder_shapes(decoder_config(CONFIG)).items()
    }
    if layout == "single":
        save_file(tensors, folder / "model.safetensors")
    else:
        _save_sharded(tensors, folder)
    return resolve(str(folder))


def _save_sharded(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    late = {name for name in tensors if ".2." in name or ".3." in name or "lm_head" in name}
    file_of = {name: "b.safetensors" if name in late else "a.safetensors" for name in tensors}
    for file in set(file_of.values()):
        save_file({n: t for n, t in tensors.items() if file_of[n] == file}, folder / file)
    index = {"weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _gguf(path: Path) -> Path:
    rng = np.random.default_rng(0)
    kv_size = NUM_KV_HEADS * HEAD_DIM
    matrices = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (kv_size, HIDDEN),
        "attn_v": (kv_size, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (MLP, HIDDEN),
        "ffn_up": (MLP, HIDDEN),
        "ffn_down": (HIDDEN, MLP),
    }
    tensors: dict[str, tuple[np.ndarray[Any, Any], Type]] = {
        "token_embd.weight": (random_blocks(rng, VOCAB, HIDDEN, Type.Q8_0), Type.Q8_0),
        "output_norm.weight": (np.ones(HIDDEN, np.float32), Type.F32),
        "rope_freqs.weight": (np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32), Type.F32),
    }
    for layer in range(NUM_LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            values = rng.standard_normal(HIDDEN).astype(np.float32)
            tensors[f"blk.{layer}.{name}.weight"] = (values, Type.F32)
        for name, shape in matrices.items():
            blocks = random_blocks(rng, *shape, Type.Q4_1)
            tensors[f"blk.{layer}.{name}.weight"] = (blocks, Type.Q4_1)
    return write_gguf(path, tensors=tensors, num_layers=NUM_LAYERS)


class Head:
    """A provider, and connections to it; the counts are of what it sent on all of them."""

    def __init__(self, provider: WeightsProvider) -> None:
        self.provider = provider
        self._ends: list[Channel] = []
        self._threads: list[threading.Thread] = []

    def call(self) -> tuple[Channel, Channel]:
        """A worker's (down, up), served by a thread."""
        ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
        ends = [Channel(end, "worker") for end in ours]
        thread = threading.Thread(target=self._serve, args=ends)
        thread.start()
        self._ends += ends
        self._threads.append(thread)
        down, up = (Channel(end, "head") for end in theirs)
        return down, up

    def fetch(self, shard: Shard, cache: Path, **options: Any) -> ModelFiles:
        down, up = self.call()
        try:
            return fetch_shard(down, up, shard, cache, **options)
        finally:
            down.close()
            up.close()

    def close(self) -> None:
        for end in self._ends:
            end.close()
        self.provider.close()
        self._wait_for_senders()

    def _serve(self, down: Channel, up: Channel) -> None:
        with suppress(PeerLost):
            self.provider.serve(down, up)
        down.close()
        up.close()

    @property
    def sent_bytes(self) -> int:
        self._wait_for_senders()
        return sum(end.sent_bytes for end in self._ends)

    @property
    def sent_messages(self) -> int:
        self._wait_for_senders()
        return sum(end.sent_messages for end in self._ends)

    def _wait_for_senders(self) -> None:
        """A frame is counted when it has been sent, which may be after it arrived."""
        for thread in self._threads:
            thread.join(timeout=10)


@contextmanager
def head_of(files: ModelFiles, cache: Path) -> Iterator[Head]:
    head = Head(WeightsProvider(files, cache))
    try:
        yield head
    finally:
        head.close()
