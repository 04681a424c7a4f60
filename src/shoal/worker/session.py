"""What a worker does for one head: it loads, forms and computes as it is told."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Literal

import msgspec
import torch

from shoal import errors
from shoal.errors import ConfigError, OperatorError, PeerLost, ShoalError
from shoal.messages import Plan
from shoal.parallel.channel import Channel
from shoal.parallel.control import (
    CacheOpened,
    Failed,
    Form,
    FromWorker,
    Load,
    Measured,
    MeasureLink,
    MeasureNode,
    OpenCache,
    Prepare,
    Stop,
    ToWorker,
)
from shoal.parallel.endpoint import Security
from shoal.worker.fetch_report import ThinnedReport
from shoal.worker.heartbeat import Heartbeat
from shoal.worker.holdings import Holdings
from shoal.worker.neighbours import Unreachable, measure_link
from shoal.worker.node_cores import compute_on
from shoal.worker.peers import Peers
from shoal.worker.profile import profile_node
from shoal.worker.shard_holder import ShardHolder
from shoal.worker.shard_source import ShardSource
from shoal.worker.stage import Stage

log = logging.getLogger(__name__)

_USAGE_INTERVAL_S = 0.5
_SURVEY_ROWS = (1, 4, 16, 64)

End = Literal["stopped", "lost"]


class Session:
    """Carries out the head's messages in order; a newer Form or Load interrupts what is under way.

    `epoch` is the newest that any head has spoken of, and `is_heard` whether this one has spoken.
    """

    def __init__(
        self,
        commands: Channel,
        reports: Channel,
        peers: Peers,
        security: Security,
        holdings: Holdings,
        call_for_weights: Callable[[], tuple[Channel, Channel]],
        *,
        epoch: int,
    ) -> None:
        self.epoch = epoch
        self.is_heard = False
        self._commands = commands
        self._reports = reports
        self._peers = peers
        self._security = security
        self._holdings = holdings
        self._source = ShardSource(call_for_weights, ThinnedReport(self._send))
        self._inbox: queue.SimpleQueue[ToWorker | None] = queue.SimpleQueue()
        # What is said for epochs before this one matters no more: a head begins behind those that
        # its workers have heard of.
        self._first_epoch = epoch + 1
        self._end: End | None = None
        self._holder: ShardHolder | None = None
        self._stage: Stage | None = None
        self._reported_s = 0.0
        self._unreported_epoch: int | None = None

    def serve(self) -> End:
        """Returns when the head says Stop, or is gone; what it said last may be left undone."""
        reader = threading.Thread(target=self._read, name="shoal-commands", daemon=True)
        reader.start()
        heartbeat = Heartbeat(self._reports, on_lost=self._hang_up)
        try:
            while (message := self._next()) is not None:
                try:
                    self._handle(message)
                except Exception as error:
                    self._report_failure(message, error)
        except PeerLost as error:
            log.info("nothing can be reported to the head: %s", str(error))
        finally:
            self._close_stage()
            self._hang_up()
            heartbeat.close()
            reader.join()
        return self._end or "lost"

    def _hang_up(self) -> None:
        self._commands.close()
        self._reports.close()

    # ---- the thread that reads ------------------------------------------------------------

    def _read(self) -> None:
        decoder = msgspec.msgpack.Decoder(ToWorker)
        end: End = "lost"
        try:
            while True:
                header, _ = self._commands.receive()
                message: ToWorker = decoder.decode(header)
                self.is_heard = True
                if isinstance(message, Stop):
                    end = "stopped"
                    return
                if isinstance(message, Form):
                    self.epoch = max(message.epoch, self.epoch)
                    self._interrupt(self.epoch)
                elif isinstance(message, Load):
                    self._interrupt(self.epoch + 1)
                self._inbox.put(message)
        except (ShoalError, msgspec.MsgspecError) as error:
            log.info("no more commands from the head: %s", str(error))
        finally:
            self._end = end
            self._interrupt(self.epoch + 1)
            self._inbox.put(None)

    def _interrupt(self, first_epoch: int) -> None:
        """What is under way for an epoch before this one matters no more."""
        self._first_epoch = first_epoch
        self._peers.forget_before(first_epoch)
        self._close_stage()

    def _close_stage(self) -> None:
        stage = self._stage
        if stage is not None:
            stage.close()

    # ---- the thread that computes ---------------------------------------------------------

    def _next(self) -> ToWorker | None:
        message = self._take()
        return message if self._end is None else None

    def _take(self) -> ToWorker | None:
        """After a while without work, the usage that its last steps have left is reported."""
        if self._unreported_epoch is None:
            return self._inbox.get()
        try:
            return self._inbox.get(timeout=_USAGE_INTERVAL_S)
        except queue.Empty:
            self._report_usage(self._unreported_epoch)
            return self._inbox.get()

    def _handle(self, message: ToWorker) -> None:
        match message:
            case Plan():
                self._step(message)
            case Load():
                self._load(message)
            case Prepare():
                self._send(self._holdings.prepare(message, self._source))
            case OpenCache():
                self._loaded().take_cache_memory(message.num_blocks)
                self._send(CacheOpened())
            case Form():
                self._form(message)
            case MeasureNode():
                self._measure_node(message)
            case MeasureLink():
                links = measure_link(message, self._peers, self._security)
                self._send(Measured(content=msgspec.json.encode(links)))

    def _load(self, load: Load) -> None:
        # Before what they hold is replaced, of which there may not be room for two.
        self._stage = self._holder = None
        compute_on(load.cores, load.num_threads)
        self._holder = self._holdings.take_seat(load, self._source)
        self._send(self._holder.loaded())

    def _measure_node(self, order: MeasureNode) -> None:
        profile = profile_node(
            order.node,
            precisions=[order.precision],
            rows=_SURVEY_ROWS,
            budget_s=order.budget_s,
            num_threads=torch.get_num_threads(),
        )
        self._send(Measured(content=msgspec.json.encode(profile)))

    def _step(self, plan: Plan) -> None:
        if plan.epoch < self._first_epoch:
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
        if self._stage is not None and epoch >= self._first_epoch:
            self._send(self._stage.usage(epoch))

    def _form(self, form: Form) -> None:
        if form.epoch < self._first_epoch:
            return
        holder = self._loaded()
        self._close_stage()
        self._stage = None
        self._stage = holder.form(form, self._peers, self._security)
        if form.epoch < self._first_epoch:
            self._close_stage()
            return
        self._send(holder.formed(form.epoch))

    def _loaded(self) -> ShardHolder:
        if self._holder is None:
            raise ConfigError("a stage cannot form before its shard is loaded")
        return self._holder

    def _send(self, message: FromWorker) -> None:
        self._reports.send(msgspec.msgpack.encode(message))

    def _report_failure(self, message: ToWorker, error: Exception) -> None:
        epoch = message.epoch if isinstance(message, Plan | Form) else None
        if epoch is not None and epoch < self._first_epoch:
            return  # interrupted on purpose
        if not isinstance(error, OperatorError | PeerLost):
            log.exception("%s failed", type(message).__name__, exc_info=error)
        self._send(
            Failed(
                epoch=self.epoch if epoch is None else epoch,
                step=message.step if isinstance(message, Plan) else None,
                kind=_kind(error),
                message=str(error),
                unreachable=error.address if isinstance(error, Unreachable) else "",
            )
        )


def _kind(error: Exception) -> str:
    """The class that the head knows as well, if there is one."""
    known = (kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    return next(known, type(error)).__name__
