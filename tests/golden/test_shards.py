"""Shards compute what the whole computes, and read no more than their share."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_checkpoints import computed, whole

from shoal.compute.linear import Scheme
from shoal.models.config import decoder_config
from shoal.models.dense_attention import dense_attention
from shoal.parallel.communicator import Solo
from shoal.parallel.partition import Shard, Span
from shoal.weights.loader import load_decoder
from shoal.weights.safetensors_file import SafetensorsFolder


class ThreadCommunicator:
    """Ranks that are threads of this process; adds in rank order."""

    def __init__(self, rank: int, barrier: threading.Barrier, partials: list[torch.Tensor]) -> None:
        self.rank = rank
        self.num_ranks = barrier.parties
        self._barrier = barrier
        self._partials = partials

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        self._partials[self.rank] = partial
        self._barrier.wait(timeout=10)
        total = sum(self._partials[1:], self._partials[0])
        self._barrier.wait(timeout=10)
        return total


def load(source, layers=None, kv_heads=None, mlp_columns=None, communicator=None):
    full = whole(decoder_config(source.config))
    communicator = communicator or Solo()
    shard = Shard(
        layers=layers or full.layers,
        num_layers=full.num_layers,
        kv_heads=kv_heads or full.kv_heads,
        mlp_columns=mlp_columns or full.mlp_columns,
        rank=communicator.rank,
        num_ranks=communicator.num_ranks,
    )
    return load_decoder(source, shard, scheme=Scheme(), communicator=communicator)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gemma3"])
@pytest.mark.parametrize("border", [1, 2, 3])
def test_two_layer_ranges_equal_the_whole_bitwise(name, border, golden):
    case = golden(name)
    positions_T = torch.arange(len(case.tokens_T))
    first = load(SafetensorsFolder(case.folder), layers=Span(0, border))
    last = load(SafetensorsFolder(case.folder), layers=Span(border, 4))
    x_TE = first(first.embed(case.tokens_T), positions_T, dense_attention)
    x_TE = last(x_TE, positions_T, dense_attention)
    whole_TV = computed(SafetensorsFolder(case.folder), case.tokens_T)
    assert torch.equal(last.logits(last.norm(x_TE)), whole_TV)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize(
    ("head_shares", "column_shares"), [([2, 1], [63, 37]), ([1, 1, 1], [50, 30, 20])]
)
def test_unequal_tensor_ranks_add_up_to_the_whole(name, head_shares, column_shares, golden):
    """Measured: max error 8e-6, from adding in another order."""
    case = golden(name)
    num_ranks = len(head_shares)
    barrier, partials = threading.Barrier(num_ranks), [torch.empty(0)] * num_ranks

    def logits_of(rank: int) -> torch.Tensor:
        communicator = ThreadCommunicator(rank, barrier, partials)
        decoder = load(
            SafetensorsFolder(case.folder),
            kv_heads=share(head_shares, rank),
            mlp_columns=share(column_shares, rank),
            communicator=communicator,
        )
        with torch.inference_mode():
            positions_T = torch.arange(len(case.tokens_T))
            x_TE = decoder(decoder.embed(case.tokens_T), positions_T, dense_attention)
            return decoder.logits(decoder.norm(x_TE))

    with ThreadPoolExecutor(num_ranks) as pool:
        logits = list(pool.map(logits_of, range(num_ranks)))
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    whole_TV = computed(SafetensorsFolder(case.folder), case.tokens_T)
    error = (logits[0] - whole_TV).abs().max().item()
    print(f"{name} {head_shares}: max error {error:.1e}")
    assert error < 2e-5


def share(shares: list[int], rank: int) -> Span:
    start = sum(shares[:rank])
    return Span(start, start + shares[rank])


def bytes_read(folder, **parts) -> int:
    source = SafetensorsFolder(folder)
    load(source, **parts)
    return source.bytes_read


def test_half_the_layers_are_half_the_bytes(golden):
    folder = golden("llama-tied").folder
    all_bytes = bytes_read(folder)
    table_bytes = 200 * 72 * 4
    norm_bytes = 72 * 4
    layer_bytes = (all_bytes - table_bytes - norm_bytes) // 4
    assert all_bytes == (folder / "model.safetensors").stat().st_size - header_bytes(folder)
    assert bytes_read(folder, layers=Span(1, 3)) == 2 * layer_bytes
    assert bytes_read(folder, layers=Span(0, 2)) == 2 * layer_bytes + table_bytes
    assert bytes_read(folder, layers=Span(2, 4)) == 2 * layer_bytes + table_bytes + norm_bytes


def header_bytes(folder) -> int:
    with (folder / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_ranks_read_every_byte_of_a_layer_once_but_the_norms(golden):
    folder = golden("llama-tied").folder
    one_layer = {"layers": Span(1, 2)}
    ranks = [
        bytes_read(folder, **one_layer, kv_heads=Span(0, 2), mlp_columns=Span(0, 63)),
        bytes_read(folder, **one_layer, kv_heads=Span(2, 3), mlp_columns=Span(63, 100)),
    ]
    norm_bytes = 2 * 72 * 4
    assert sum(ranks) == bytes_read(folder, **one_layer) + norm_bytes


def test_a_tied_head_shares_the_embedding_table(golden):
    decoder = load(SafetensorsFolder(golden("llama-tied").folder))
    embedding, head = decoder._embedding, decoder._head
    assert embedding.table_VE.data_ptr() == head.weight_NK.data_ptr()
