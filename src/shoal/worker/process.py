"""A worker process: dials its head, then loads, forms and computes as it is told."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

import msgspec
import torch
from msgspec import structs

from shoal.errors import ConfigError, OperatorError, PeerLost, ShoalError
from shoal.messages import Plan
from shoal.parallel.channel import Channel
from shoal.parallel.control import (
    CacheOpened,
    Failed,
    Form,
    Formed,
    FromWorker,
    Heard,
    Hello,
    Load,
    Measured,
    MeasureLink,
    MeasureNode,
    OpenCache,
    Stop,
    ToWorker,
)
from shoal.parallel.endpoint import Security, listen
from shoal.parallel.head_call import call_head
from shoal.worker.fetch_report import ThinnedReport
from shoal.worker.neighbours import measure_link
from shoal.worker.peers import Peers
from shoal.worker.profile import profile_node
from shoal.worker.shard_holder import ShardHolder
from shoal.worker.stage import Stage

log = logging.getLogger(__name__)

_USAGE_INTERVAL_S = 0.5
_SURVEY_ROWS = (1, 4, 16, 64)


def run(
    head_address: str, worker: str, security: Security, listen_address: str, num_threads: int
) -> None:
    """Work for the head until it says Stop or its connection ends.

    Raises PeerLost when the head cannot be reached, PeerRefused when it refuses us.
    """
    torch.set_num_threads(num_threads)
    peers = Peers(listen(listen_address, security))
    try:
        hello = Hello(service="worker", direction="down", caller=worker, address=peers.address)
        commands, reports = call_head(head_address, security, hello)

        def call_for_weights() -> tuple[Channel, Channel]:
            return call_head(head_address, security, structs.replace(hello, service="weights"))

        WorkerProcess(commands, reports, peers, security, call_for_weights).serve()
    finally:
        peers.close()


class WorkerProcess:
    """Carries out the head's messages in order; a newer Form interrupts what is under way."""

    def __init__(
        self,
        commands: Channel,
        reports: Channel,
        peers: Peers,
        security: Security,
        call_for_weights: Callable[[], tuple[Channel, Channel]],
    ) -> None:
        self._commands = commands
        self._reports = reports
        self._peers = peers
        self._security = security
        self._call_for_weights = call_for_weights
        self._inbox: queue.SimpleQueue[ToWorker | None] = queue.SimpleQueue()
        self._newest_epoch = 0
        self._holder: ShardHolder | None = None
        self._stage: Stage | None = None
        self._reported_s = 0.0
        self._unreported_epoch: int | None = None

    def serve(self) -> None:
        reader = threading.Thread(target=self._read, name="shoal-commands", daemon=True)
        reader.start()
        try:
            while (message := self._next()) is not None:
                try:
                    self._handle(message)
                except Exception as error:
                    self._report_failure(message, error)
        except PeerLost:
            log.warning("the head is gone; this worker ends")
        finally:
            self._close_stage()
            self._commands.close()
            self._reports.close()
            reader.join()

    # ---- the thread that reads ------------------------------------------------------------

    def _read(self) -> None:
        decoder = msgspec.msgpack.Decoder(ToWorker)
        try:
            while True:
                header, _ = self._commands.receive()
                message: ToWorker = decoder.decode(header)
                if isinstance(message, Stop):
                    return
                if isinstance(message, Form):
                    self._send(Heard(epoch=message.epoch))
                    self._interrupt(message.epoch)
                self._inbox.put(message)
        except (ShoalError, msgspec.MsgspecError) as error:
            log.info("no more commands from the head: %s", error)
        finally:
            self._interrupt(self._newest_epoch + 1)
            self._inbox.put(None)

    def _interrupt(self, epoch: int) -> None:
        """What is under way for an epoch before this one matters no more."""
        self._newest_epoch = epoch
        self._peers.forget_before(epoch)
        self._close_stage()

    def _close_stage(self) -> None:
        stage = self._stage
        if stage is not None:
            stage.close()

    # ---- the thread that computes ---------------------------------------------------------

    def _next(self) -> ToWorker | None:
        """After a while without work, the usage that its last steps have left is reported."""
        if self._unreported_epoch is None:
            return self._inbox.get()
        try:
            return self._inbox.get(timeout=_USAGE_INTERVAL_S)
        except queue.Empty:
            self._report_usage(self._unreported_epoch)
            return self._inbox.get()

    def _handle(self, message: ToWorker) -> None:
        if isinstance(message, Plan):
            self._step(message)
        elif isinstance(message, Load):
            self._holder = ShardHolder(message, self._call_for_weights, ThinnedReport(self._send))
            self._send(self._holder.loaded())
        elif isinstance(message, OpenCache):
            self._loaded().open_cache(message.num_blocks)
            self._send(CacheOpened())
        elif isinstance(message, Form):
            self._form(message)
        elif isinstance(message, MeasureNode):
            profile = profile_node(
                message.node,
                precisions=[message.precision],
                rows=_SURVEY_ROWS,
                budget_s=message.budget_s,
                num_threads=torch.get_num_threads(),
            )
            self._send(Measured(content=msgspec.json.encode(profile)))
        elif isinstance(message, MeasureLink):
            links = measure_link(message, self._peers, self._security)
            self._send(Measured(content=msgspec.json.encode(links)))

    def _step(self, plan: Plan) -> None:
        if plan.epoch < self._newest_epoch:
            return
        if self._stage is None:
            raise ConfigError("a plan came before its stage was formed")
        result = self._stage.execute(plan)
        if result is not None:
            self._send(result)
        self._unreported_epoch = plan.epoch
        if time.monotonic() - self._reported_s > _USAGE_INTERVAL_S:
            self._report_usage(plan.epoch)

    def _report_usage(self, epoch: int) -> None:
        self._reported_s = time.monotonic()
        self._unreported_epoch = None
        if self._stage is not None and epoch == self._newest_epoch:
            self._send(self._stage.usage(epoch))

    def _form(self, form: Form) -> None:
        if form.epoch < self._newest_epoch:
            return
        holder = self._loaded()
        self._close_stage()
        self._stage = None
        self._stage = holder.form(form, self._peers, self._security)
        if form.epoch < self._newest_epoch:
            self._close_stage()
            return
        self._send(Formed(epoch=form.epoch))

    def _loaded(self) -> ShardHolder:
        if self._holder is None:
            raise ConfigError("a stage cannot form before its shard is loaded")
        return self._holder

    def _send(self, message: FromWorker) -> None:
        self._reports.send(msgspec.msgpack.encode(message))

    def _report_failure(self, message: ToWorker, error: Exception) -> None:
        epoch = message.epoch if isinstance(message, Plan | Form) else self._newest_epoch
        if epoch < self._newest_epoch:
            return  # interrupted on purpose
        if not isinstance(error, OperatorError | PeerLost):
            log.exception("%s failed", type(message).__name__, exc_info=error)
        self._send(
            Failed(
                epoch=epoch,
                step=message.step if isinstance(message, Plan) else None,
                kind=type(error).__name__,
                message=str(error),
            )
        )
