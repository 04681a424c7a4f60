"""Ranks as threads of one process: memory and sockets work among them as among processes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch

from shoal.config import WireFormat
from shoal.kernels import kernels as native_kernels
from shoal.parallel.channel import Channel
from shoal.parallel.collective import TorchCollective
from shoal.parallel.communicator import Communicator, Solo
from shoal.parallel.shared_memory import SharedMemory
from shoal.parallel.socket_exchange import SocketExchange

T = TypeVar("T")
SLOT_BYTES = 4096
# By ranks with kernels where somebody built them, by ranks without, and by some of each.
MEMORY_KERNELS: dict[str, Sequence[ModuleType | None]] = {
    "memory": (native_kernels,),
    "memory without kernels": (None,),
    "memory of both kinds": (native_kernels, None),
}


def run_ranks(num_ranks: int, call: Callable[[int], T]) -> list[T]:
    """`call(rank)` of every rank at once."""
    with ThreadPoolExecutor(num_ranks) as threads:
        return list(threads.map(call, range(num_ranks)))


@contextmanager
def connected(
    kind: str, num_ranks: int, folder: Path, *, timeout_s: float = 10.0
) -> Iterator[Sequence[Communicator]]:
    if num_ranks == 1:
        ranks: Sequence[Communicator] = [Solo()]
    elif kind in MEMORY_KERNELS:
        ranks = shared_memory(num_ranks, folder, timeout_s=timeout_s, kernels=MEMORY_KERNELS[kind])
    elif kind == "sockets":
        ranks = socket_exchange(num_ranks, timeout_s=timeout_s)
    else:
        ranks = gloo(num_ranks, timeout_s=timeout_s)
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.close()


def shared_memory(
    num_ranks: int,
    folder: Path,
    *,
    timeout_s: float,
    slot_bytes: int = SLOT_BYTES,
    kernels: Sequence[ModuleType | None] = (native_kernels,),
) -> list[SharedMemory]:
    """The ranks have these `kernels` in turn."""

    def connect(rank: int) -> SharedMemory:
        return SharedMemory(
            rank,
            num_ranks,
            "test",
            slot_bytes=slot_bytes,
            timeout_s=timeout_s,
            folder=folder,
            kernels=kernels[rank % len(kernels)],
        )

    return run_ranks(num_ranks, connect)


def socket_exchange(
    num_ranks: int, *, timeout_s: float = 10.0, wire_format: WireFormat = "exact"
) -> list[SocketExchange]:
    senders: list[list[Channel | None]] = [[None] * num_ranks for _ in range(num_ranks)]
    receivers: list[list[Channel | None]] = [[None] * num_ranks for _ in range(num_ranks)]
    for source in range(num_ranks):
        for target in range(num_ranks):
            if source != target:
                ends = socket.socketpair()
                senders[source][target] = Channel(ends[0], "local")
                receivers[target][source] = Channel(ends[1], "local")
    return [
        SocketExchange(
            rank, senders[rank], receivers[rank], timeout_s=timeout_s, wire_format=wire_format
        )
        for rank in range(num_ranks)
    ]


def gloo(num_ranks: int, *, timeout_s: float) -> list[TorchCollective]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def connect(rank: int) -> TorchCollective:
        return TorchCollective(
            "gloo",
            rank,
            num_ranks,
            "127.0.0.1",
            port,
            epoch=1,
            own_address="127.0.0.1",
            timeout_s=timeout_s,
        )

    return run_ranks(num_ranks, connect)


def partials(num_ranks: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Of such magnitudes that another order of adding gives another sum."""
    draw = torch.Generator().manual_seed(num_ranks)
    magnitudes = (1.0, 1e4, -1e4, 1e-3)
    return [
        (torch.randn(shape, generator=draw) * magnitudes[rank]).to(dtype)
        for rank in range(num_ranks)
    ]


def sum_in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)
