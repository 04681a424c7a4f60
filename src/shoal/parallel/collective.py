"""Sums through torch.distributed: gloo as the portable fallback, NCCL between GPUs of one host."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from shoal.errors import ConfigError, InternalError, PeerLost

_POLL_S = 0.002
_SLEEP_S = 0.0002
# Past the group's own timeout, so that a call which times out has ended by itself.
_GRACE_S = 1.0


class TorchCollective:
    """A Communicator over a process group of its own. Neither backend encrypts or authenticates:
    for one trusted host or network only.

    It gathers and then adds, because the backends' own sums promise no order. NCCL, which takes
    CUDA tensors, has the same code but has not been run yet: unverified.

    A group whose call is pending must not be destroyed (that blocks), and its call cannot be
    cancelled. So the call that gives up parks group and call with a thread, which lets go of them
    when the backend's own timeout has ended the call.
    """

    native_ranks = None

    def __init__(
        self,
        backend: Literal["gloo", "nccl"],
        rank: int,
        num_ranks: int,
        address: str,
        port: int,
        epoch: int,
        *,
        own_address: str,
        timeout_s: float = 10.0,
    ) -> None:
        """Waits until every rank has come. `address` and `port` are where rank 0 keeps the store
        in which the ranks find each other; `own_address` is this rank's, which gloo would guess
        from the host name, often wrong. Raises PeerLost, ConfigError if torch lacks the backend.
        """
        self.rank = rank
        self.num_ranks = num_ranks
        self.sent_bytes = 0
        self.sent_messages = 0
        self._timeout_s = timeout_s
        self._closed = False
        timeout = timedelta(seconds=timeout_s)
        try:
            # Multi-tenant: a rank 0 that re-forms finds its port taken by its own older store.
            store = TCPStore(address, port, None, rank == 0, timeout, False, multi_tenant=True)
            prefixed = PrefixStore(f"shoal-{epoch}", store)
            self._group = _make_group(backend, prefixed, rank, num_ranks, own_address, timeout)
        except RuntimeError as error:
            raise PeerLost(
                f"rank {rank} of {num_ranks} could not form a {backend} group at {address}:{port} "
                f"({str(error).splitlines()[0]})"
            ) from error

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum, a new tensor; below float32 it is added in float32 and rounded once."""
        total, *rest = self._all_gather(partial)
        if partial.dtype != torch.float32:
            total = total.float()
        for part in rest:
            total.add_(part)
        return total.to(partial.dtype)

    def gather(self, part: torch.Tensor) -> list[torch.Tensor] | None:
        width = torch.tensor([part.shape[-1]], device=part.device)
        widths = [int(each) for each in self._all_gather(width)]
        # The backends gather equal sizes only.
        padded = part.new_zeros((*part.shape[:-1], max(widths)))
        padded[..., : part.shape[-1]] = part
        parts = self._all_gather(padded)
        if self.rank != 0:
            return None
        return [each[..., :width].contiguous() for each, width in zip(parts, widths, strict=True)]

    def close(self) -> None:
        """Make a call that waits in another thread raise PeerLost, and every later one."""
        self._closed = True

    def _all_gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        if self._closed:
            raise PeerLost(f"rank {self.rank} has closed its process group")
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.num_ranks)]
        if part.numel() == 0:
            return parts
        try:
            # As bytes, which every backend carries, whatever the dtype.
            work = self._group.allgather([[_bytes(each) for each in parts]], [_bytes(part)])
            self._await(work)
            work.wait()
        except RuntimeError as error:
            raise PeerLost(
                f"rank {self.rank}: a peer broke off ({str(error).splitlines()[0]})"
            ) from error
        self.sent_bytes += part.nbytes * (self.num_ranks - 1)
        self.sent_messages += self.num_ranks - 1
        return parts

    def _await(self, work: dist.Work) -> None:
        started_s = time.monotonic()
        while not work.is_completed():
            waited_s = time.monotonic() - started_s
            if self._closed or waited_s > self._timeout_s + _GRACE_S:
                hold = threading.Thread(
                    target=_hold, args=(self._group, work), name="shoal-parked-group", daemon=True
                )
                hold.start()
                self._closed = True
                raise PeerLost(
                    f"rank {self.rank} gave up a call after {waited_s:.1f} s: its group was closed "
                    "or a peer has been silent"
                )
            if waited_s < _POLL_S:
                os.sched_yield()
            else:
                time.sleep(_SLEEP_S)


def _make_group(
    backend: str,
    store: PrefixStore,
    rank: int,
    num_ranks: int,
    own_address: str,
    timeout: timedelta,
) -> Any:  # torch's type stubs know little of its groups
    if backend == "gloo":
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=own_address)]
        options._timeout = timeout
        return gloo(store, rank, num_ranks, options)
    if backend != "nccl":
        raise InternalError(f"no backend {backend!r}: gloo or nccl")
    if not dist.is_nccl_available():
        raise ConfigError("this build of torch has no NCCL: choose another transport")
    nccl_options = dist.ProcessGroupNCCL.Options()
    nccl_options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, num_ranks, nccl_options)


def _hold(group: Any, work: dist.Work) -> None:
    """Keep a group alive until its pending call has ended, one way or the other."""
    while not work.is_completed():
        time.sleep(0.1)
    del work, group


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
