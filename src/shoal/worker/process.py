"""A worker process: dials its head, serves it, and may wait for the next one when it is gone."""

from __future__ import annotations

import logging
import os
import time

from msgspec import structs

from shoal.compute.threads import set_num_threads
from shoal.errors import PeerLost, PeerRefused
from shoal.parallel.channel import Channel
from shoal.parallel.control import Hello
from shoal.parallel.endpoint import Security, listen
from shoal.parallel.head_call import call_head
from shoal.worker.holdings import Holdings
from shoal.worker.peers import Peers
from shoal.worker.session import Session

log = logging.getLogger(__name__)

_REDIAL_S = 0.25
_DIAL_S = 2.0


def run(
    head_address: str, worker: str, security: Security, listen_address: str, num_threads: int
) -> None:
    """Work for the head until it says Stop, or is gone and none takes its place in time.

    Raises PeerLost when the head cannot be reached, PeerRefused when it refuses us.
    """
    set_num_threads(num_threads)
    peers = Peers(listen(listen_address, security))
    try:
        _Worker(head_address, worker, security, peers).work()
    finally:
        peers.close()


class _Worker:
    def __init__(self, head_address: str, worker: str, security: Security, peers: Peers) -> None:
        self._head_address = head_address
        self._security = security
        self._peers = peers
        self._holdings = Holdings()
        self._hello = Hello(
            service="worker",
            direction="down",
            caller=worker,
            address=peers.address,
            pid=os.getpid(),
        )
        # Until when the next head may come, of those that have not said a word yet.
        self._deadline_s: float | None = None

    def work(self) -> None:
        line: tuple[Channel, Channel] | None = call_head(
            self._head_address, self._security, self._hello
        )
        while line is not None:
            session = Session(
                *line,
                self._peers,
                self._security,
                self._holdings,
                self._call_for_weights,
                epoch=self._hello.epoch,
            )
            if session.serve() == "stopped":
                return
            if session.is_heard:
                self._deadline_s = None
            self._hello = structs.replace(
                self._hello, shards=self._holdings.shards, epoch=session.epoch
            )
            line = self._next_head()

    def _next_head(self) -> tuple[Channel, Channel] | None:
        """None when there is nothing to keep for it, or none comes in time."""
        hold_s = self._holdings.hold_s
        if hold_s == 0:
            log.warning("the head is gone; this worker ends")
            return None
        if self._deadline_s is None:
            log.warning("the head is gone; this worker waits %.0f s for the next", hold_s)
            self._deadline_s = time.monotonic() + hold_s
        while time.monotonic() < self._deadline_s:
            time.sleep(_REDIAL_S)
            try:
                return call_head(self._head_address, self._security, self._hello, timeout_s=_DIAL_S)
            except (PeerLost, PeerRefused) as error:
                log.debug("no head yet: %s", str(error))
        log.warning("no head came within %.0f s; this worker ends", hold_s)
        return None

    def _call_for_weights(self) -> tuple[Channel, Channel]:
        hello = structs.replace(self._hello, service="weights")
        return call_head(self._head_address, self._security, hello)
