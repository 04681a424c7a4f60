"""What a sum between two processes costs: `python bench/communicators.py [--calls N]`.

Method: two processes, each pinned to one core with one thread, make the same `all_reduce` calls in
a row over every communicator; a sample is one call as rank 0 sees it, after a warm-up of a tenth
of them. Sizes: one token of SmolLM2-135M (576 floats), seven (4096), and 1 MiB. Two floors stand
beside them in the same run: what one process needs to copy a part twice and to add it, without
any peer, and half a round trip through a plain unix socket.
Limit: shared memory at or below 35 µs for 576 floats.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from shoal.parallel.collective import TorchCollective
from shoal.parallel.communicator import Communicator
from shoal.parallel.endpoint import LocalOnly, MutualTls, Plaintext, Security, dial, listen
from shoal.parallel.identity import (
    create_authority,
    install,
    issue,
    load_identity,
    make_request,
)
from shoal.parallel.shared_memory import SharedMemory
from shoal.parallel.socket_exchange import SocketExchange

SIZES = {576: 1, 4096: 3, 1 << 18: 30}
"""Floats in a part, and by how much fewer calls of that size are made."""
HOST = "127.0.0.1"
TIMEOUT_S = 30.0
Measured = dict[str, list[list[float]]]


class Row(msgspec.Struct, kw_only=True):
    way: str
    num_floats: int
    median_us: float
    p90_us: float


def make_nodes(folder: Path) -> None:
    ca_pem = create_authority(folder / "ca")
    for node in ("rank-0", "rank-1"):
        request = make_request(folder / node, node)
        certificate = issue(folder / "ca", request, node=node, addresses=[HOST])
        install(folder / node, certificate, ca_pem)


def exchange_over(
    rank: int, address: str, security: Security, other_rank: Connection
) -> SocketExchange:
    listener = listen(address, security)
    other_rank.send(listener.address)
    sender = dial(other_rank.recv(), security, timeout_s=TIMEOUT_S)
    receiver = listener.accept(TIMEOUT_S)
    listener.close()
    return SocketExchange(rank, [sender], [receiver], timeout_s=TIMEOUT_S)


def gloo(rank: int, other_rank: Connection) -> TorchCollective:
    if rank == 0:
        with socket.create_server((HOST, 0)) as free:
            other_rank.send(free.getsockname()[1])
            port = free.getsockname()[1]
    else:
        port = other_rank.recv()
    return TorchCollective(
        "gloo", rank, 2, HOST, port, epoch=1, own_address=HOST, timeout_s=TIMEOUT_S
    )


@contextmanager
def communicators(
    rank: int, folder: Path, other_rank: Connection
) -> Iterator[dict[str, Communicator]]:
    identity = load_identity(folder / f"rank-{rank}")
    ways: dict[str, Communicator] = {
        "shared memory": SharedMemory(rank, 2, f"bench-{folder.name}", timeout_s=TIMEOUT_S),
        "unix sockets": exchange_over(rank, f"unix:{folder}/{rank}", LocalOnly(), other_rank),
        "TCP sockets": exchange_over(rank, f"tcp:{HOST}:0", Plaintext(), other_rank),
        "mutual TLS sockets": exchange_over(rank, f"tls:{HOST}:0", MutualTls(identity), other_rank),
        "gloo": gloo(rank, other_rank),
    }
    try:
        yield ways
    finally:
        for way in ways.values():
            way.close()


def sample_us(call: Callable[[], object], num_calls: int) -> list[float]:
    num_warm_up = num_calls // 10
    times_us = []
    for _ in range(num_warm_up + num_calls):
        started_s = time.perf_counter()
        call()
        times_us.append((time.perf_counter() - started_s) * 1e6)
    return times_us[num_warm_up:]


def round_trip(rank: int, stream: socket.socket, buffer: memoryview) -> None:
    if rank == 0:
        stream.sendall(buffer)
        stream.recv_into(buffer, len(buffer), socket.MSG_WAITALL)
    else:
        stream.recv_into(buffer, len(buffer), socket.MSG_WAITALL)
        stream.sendall(buffer)


def copy_and_add(part: torch.Tensor) -> Callable[[], object]:
    own = part.numpy()
    slot, other = np.empty_like(own), np.ones_like(own)

    def call() -> None:
        slot[...] = own
        other[...] = slot
        np.add(slot, other, own)

    return call


def measure(
    rank: int, folder: Path, num_calls: int, other_rank: Connection, stream: socket.socket
) -> Measured:
    measured: Measured = {}
    with communicators(rank, folder, other_rank) as ways:
        for num_floats, fewer in SIZES.items():
            count = max(20, num_calls // fewer)
            part = torch.zeros(1, num_floats)
            for name, way in ways.items():
                times_us = sample_us(lambda way=way, part=part: way.all_reduce(part), count)
                measured.setdefault(name, []).append(times_us)
            buffer = memoryview(bytearray(part.nbytes))
            trips_us = sample_us(lambda buffer=buffer: round_trip(rank, stream, buffer), count)
            floor = measured.setdefault("floor: half a unix round trip", [])
            floor.append([each / 2 for each in trips_us])
            copies_us = sample_us(copy_and_add(part), count)
            measured.setdefault("floor: copy twice, add", []).append(copies_us)
    return measured


def run_rank(
    rank: int,
    folder: Path,
    num_calls: int,
    other_rank: Connection,
    stream: socket.socket,
    answer: Connection,
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    measured = measure(rank, folder, num_calls, other_rank, stream)
    if rank == 0:
        answer.send(measured)


def measure_pair(num_calls: int) -> Measured:
    spawn = multiprocessing.get_context("spawn")
    answer, answering = spawn.Pipe(duplex=False)
    links, streams = spawn.Pipe(), socket.socketpair()
    with tempfile.TemporaryDirectory() as name:
        make_nodes(Path(name))
        ranks = [
            spawn.Process(
                target=run_rank,
                args=(rank, Path(name), num_calls, links[rank], streams[rank], answering),
            )
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        measured: Measured = answer.recv()
        for process in ranks:
            process.join()
    for stream in streams:
        stream.close()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=3000, help="calls of 576 floats (3000)")
    measured = measure_pair(parser.parse_args().calls)
    table = Table("way", *(f"{size} floats: median, p90 µs" for size in SIZES))
    rows = []
    for way, sizes in measured.items():
        cells = []
        for num_floats, times_us in zip(SIZES, sizes, strict=True):
            median_us = statistics.median(times_us)
            p90_us = statistics.quantiles(times_us, n=10)[-1]
            rows.append(
                Row(
                    way=way,
                    num_floats=num_floats,
                    median_us=round(median_us, 1),
                    p90_us=round(p90_us, 1),
                )
            )
            cells.append(f"{median_us:.1f}  {p90_us:.1f}")
        table.add_row(way, *cells)
    for column in table.columns[1:]:
        column.justify = "right"
    Console().print(table)
    print(json.dumps({"benchmark": "communicators", "rows": msgspec.to_builtins(rows)}))


if __name__ == "__main__":
    main()
