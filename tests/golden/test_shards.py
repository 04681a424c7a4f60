"""Shards compute what the whole computes, and read no more than their share."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_checkpoints import computed

from shoal.compute.linear import Scheme
from shoal.models.config import decoder_config
from shoal.models.dense_attention import DenseAttend
from shoal.parallel.communicator import Solo
from shoal.parallel.partition import Shard, Span, shards_of
from shoal.weights.loader import load_decoder
from shoal.weights.safetensors_file import SafetensorsFolder


class ThreadCommunicator:
    """Ranks that are threads of this process; adds in rank order."""

    def __init__(self, rank: int, barrier: threading.Barrier, parts: list[torch.Tensor]) -> None:
        self.rank = rank
        self.num_ranks = barrier.parties
        self._barrier = barrier
        self._parts = parts

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        parts = self._exchange(partial)
        return sum(parts[1:], parts[0])

    def gather(self, part: torch.Tensor) -> list[torch.Tensor] | None:
        parts = self._exchange(part)
        return parts if self.rank == 0 else None

    def _exchange(self, part: torch.Tensor) -> list[torch.Tensor]:
        self._parts[self.rank] = part
        self._barrier.wait(timeout=10)
        parts = list(self._parts)
        self._barrier.wait(timeout=10)
        return parts


def load(source, layers=None):
    config = decoder_config(source.config)
    (shard,) = shards_of(config.dims, layers or Span(0, config.num_layers), [1])
    return load_decoder(source, shard, scheme=Scheme(), communicator=Solo())


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gemma3"])
@pytest.mark.parametrize("border", [1, 2, 3])
def test_two_layer_ranges_equal_the_whole_bitwise(name, border, golden):
    case = golden(name)
    positions = list(range(len(case.tokens_T)))
    first = load(SafetensorsFolder(case.folder), layers=Span(0, border))
    last = load(SafetensorsFolder(case.folder), layers=Span(border, 4))
    x_TE = first(first.embed(case.tokens_T.tolist()), positions, DenseAttend())
    x_TE = last(x_TE, positions, DenseAttend())
    whole_TV = computed(SafetensorsFolder(case.folder), case.tokens_T)
    assert torch.equal(last.logits(x_TE), whole_TV)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("shares", [[63, 37], [50, 30, 20], [1, 1, 1, 1]])
def test_unequal_tensor_ranks_add_up_to_the_whole(name, shares, golden):
    """Four ranks are more than there are KV heads. Measured: max error 8e-6, from adding in
    another order."""
    case = golden(name)
    num_ranks = len(shares)
    barrier, parts = threading.Barrier(num_ranks), [torch.empty(0)] * num_ranks

    def output_of(rank: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        source = SafetensorsFolder(case.folder)
        communicator = ThreadCommunicator(rank, barrier, parts)
        shard = tensor_shards(source, shares)[rank]
        decoder = load_decoder(source, shard, scheme=Scheme(), communicator=communicator)
        with torch.inference_mode():
            positions = list(range(len(case.tokens_T)))
            x_TE = decoder(decoder.embed(case.tokens_T.tolist()), positions, DenseAttend())
            return x_TE, decoder.logits(x_TE)

    with ThreadPoolExecutor(num_ranks) as pool:
        outputs = list(pool.map(output_of, range(num_ranks)))
    states = [x_TE for x_TE, _ in outputs]
    assert all(torch.equal(states[0], other) for other in states[1:])
    assert all(logits is None for _, logits in outputs[1:])
    whole_TV = computed(SafetensorsFolder(case.folder), case.tokens_T)
    error = (outputs[0][1] - whole_TV).abs().max().item()
    print(f"{name} {shares}: max error {error:.1e}")
    assert error < 2e-5


def tensor_shards(source, shares, layers=None) -> list[Shard]:
    config = decoder_config(source.config)
    return shards_of(config.dims, layers or Span(0, config.num_layers), shares)


def bytes_read(folder, layers=None) -> int:
    source = SafetensorsFolder(folder)
    load(source, layers)
    return source.bytes_read


class DeafCommunicator(Solo):
    """Enough to load with."""

    num_ranks = 2


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
    num_read = 0
    for rank in range(2):
        source = SafetensorsFolder(folder)
        shard = tensor_shards(source, [63, 37], layers=Span(1, 2))[rank]
        load_decoder(source, shard, scheme=Scheme(), communicator=DeafCommunicator())
        num_read += source.bytes_read
    norm_bytes = 2 * 72 * 4
    assert num_read == bytes_read(folder, layers=Span(1, 2)) + norm_bytes


def test_a_tied_head_shares_the_embedding_table(golden):
    decoder = load(SafetensorsFolder(golden("llama-tied").folder))
    embedding, head = decoder.embedding, decoder.head
    assert embedding.table_VE.data_ptr() == head.linear.weight_NK.data_ptr()
