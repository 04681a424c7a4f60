"""Small tensors that share large pieces of memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from shoal.compute.zeroed_memory import Slabs

MIB = 2**20


def test_tensors_are_zeroed_and_their_own() -> None:
    slabs = Slabs()
    sizes = [1, 100, 3 * MIB, 64, 4 * MIB, 5 * MIB, 3 * MIB, 4 * MIB, 7]
    with ThreadPoolExecutor(4) as threads:
        tensors = list(threads.map(slabs.zeroed, sizes))
    for number, (tensor, size) in enumerate(zip(tensors, sizes, strict=True), start=1):
        assert tensor.shape == (size,)
        assert not tensor.any()
        tensor.fill_(number)
    for number, tensor in enumerate(tensors, start=1):
        assert (tensor == number).all()
        assert tensor.data_ptr() % 64 == 0


def test_small_ones_lie_side_by_side() -> None:
    slabs = Slabs()
    first, second = slabs.zeroed(100), slabs.zeroed(1)
    assert second.data_ptr() == first.data_ptr() + 128


def test_a_large_one_takes_no_room_from_the_small() -> None:
    slabs = Slabs()
    first, _, second = slabs.zeroed(64), slabs.zeroed(32 * MIB), slabs.zeroed(64)
    assert second.data_ptr() == first.data_ptr() + 64
