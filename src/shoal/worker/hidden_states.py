"""Hidden states on their way from one stage to the next, never through the head."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from shoal.config import WireFormat
from shoal.errors import FrameError
from shoal.messages import Plan
from shoal.parallel import wire
from shoal.parallel.channel import Channel
from shoal.parallel.control import HiddenStates

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Outlet:
    """To the workers of the next stage that this one serves."""

    def __init__(self, channels: Sequence[Channel], wire_format: WireFormat) -> None:
        self._channels = channels
        self._wire_format: WireFormat = wire_format

    def send(self, plan: Plan, x_TE: torch.Tensor) -> None:
        header = msgspec.msgpack.encode(
            HiddenStates(
                epoch=plan.epoch,
                step=plan.step,
                num_tokens=x_TE.shape[0],
                dtype=str(x_TE.dtype).removeprefix("torch."),
            )
        )
        body = wire.encode(x_TE, self._wire_format)
        for channel in self._channels:
            channel.send(header, body)

    @property
    def sent_bytes(self) -> int:
        return sum(channel.sent_bytes for channel in self._channels)

    @property
    def sent_messages(self) -> int:
        return sum(channel.sent_messages for channel in self._channels)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()


class Inlet:
    """From a worker of the previous stage. `width` is the model's hidden size."""

    def __init__(self, channel: Channel, wire_format: WireFormat, *, width: int) -> None:
        self._channel = channel
        self._wire_format: WireFormat = wire_format
        self._width = width
        self._decoder = msgspec.msgpack.Decoder(HiddenStates)

    def receive(self, plan: Plan, *, timeout_s: float) -> torch.Tensor:
        """The states [T, E] of a plan. Raises PeerLost, or FrameError if they are another's."""
        header, body = self._channel.receive(timeout_s)
        try:
            states = self._decoder.decode(header)
        except msgspec.MsgspecError as error:
            raise FrameError(f"not an announcement of hidden states: {error}") from error
        announced = (states.epoch, states.step, states.num_tokens)
        if announced != (plan.epoch, plan.step, plan.num_tokens) or states.dtype not in _DTYPES:
            raise FrameError(
                f"hidden states of (epoch, step, tokens) {announced} in {states.dtype} came for a "
                f"plan with {(plan.epoch, plan.step, plan.num_tokens)}"
            )
        shape = (states.num_tokens, self._width)
        dtype = _DTYPES[states.dtype]
        return wire.decode(body, self._wire_format, shape=shape, dtype=dtype)

    def close(self) -> None:
        self._channel.close()
