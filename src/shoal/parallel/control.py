"""What the head of a replica and its worker processes say to each other besides plans.

A worker dials the head, says Hello, and is told what to load, with whom to form, and to stop.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.config import EngineConfig, Quantize, Transport, WireFormat
from shoal.messages import Plan, StepResult
from shoal.parallel.partition import Shard

# ---- head to worker -----------------------------------------------------------------------


Role = Literal["rank", "stage", "link"]


class KeptCache(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A KV cache that the last worker of a seat has left: see `worker.cache_memory`."""

    path: str
    identity: str
    dtype: str


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load", forbid_unknown_fields=True):
    """Hold this shard of a model, and take a seat. Answered by Loaded or Failed.

    What a worker holds of it already (a shard it has prepared, or held under an earlier head,
    layers of another shard) is not read again. `path` is where the model lies on the worker's
    machine; "" asks the head for its tensors. `memory_share` is this worker's part of what its
    node gives to KV caches; `num_blocks`, if given, is what the cache of its replica has, to be
    kept if memory allows. It computes with `num_threads` on `cores` (() leaves that to the
    system); `own_cores` says whether no other worker computes on them.
    """

    config: EngineConfig
    path: str
    shard: Shard
    memory_share: float
    own_cores: bool
    num_blocks: int | None = None
    num_threads: int | None = None
    cores: tuple[int, ...] = ()
    cache: KeptCache | None = None


class Prepare(msgspec.Struct, frozen=True, kw_only=True, tag="prepare", forbid_unknown_fields=True):
    """Read this shard's weights ahead of a Load, if memory allows. Answered by Prepared or Failed.

    A spare may prepare several shards; its Load drops all but the one it names.
    """

    config: EngineConfig
    path: str
    shard: Shard


class OpenCache(
    msgspec.Struct, frozen=True, kw_only=True, tag="open_cache", forbid_unknown_fields=True
):
    """Take the memory for a cache of that many blocks ahead of a Form. Answered by CacheOpened."""

    num_blocks: int


class Form(msgspec.Struct, frozen=True, kw_only=True, tag="form", forbid_unknown_fields=True):
    """Drop what is under way, open a cache of `num_blocks`, and connect for a new epoch.

    `ranks` are the addresses of the stage's workers in rank order, `next_stage` of those that the
    worker sends hidden states to, and `previous_rank` the rank in the previous stage from which it
    receives its own. `session` names the shared memory of this stage and epoch. Answered by
    Formed or Failed.
    """

    epoch: int
    num_blocks: int
    ranks: list[str]
    next_stage: list[str] = []
    previous_rank: int | None = None
    transport: Transport
    wire_format: WireFormat
    session: str


class MeasureNode(
    msgspec.Struct, frozen=True, kw_only=True, tag="measure_node", forbid_unknown_fields=True
):
    """Measure this machine under the name of its node. Answered by Measured or Failed."""

    node: str
    precision: Quantize
    budget_s: float


class MeasureLink(
    msgspec.Struct, frozen=True, kw_only=True, tag="measure_link", forbid_unknown_fields=True
):
    """Measure the way to another worker, which is told to answer; `number` names the pair.

    Answered by Measured, with nothing in it from the one that answers, or by Failed.
    """

    number: int
    here: str
    there: str
    address: str
    asks: bool


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop", forbid_unknown_fields=True):
    """Exit, in order."""


# ---- worker to head -----------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello", forbid_unknown_fields=True):
    """The first message on each of the two connections that a service of the head takes.

    On the "down" one only the head sends from now on, on the "up" one only the caller. `caller`
    is a worker's name or an operator's; `address` is where other workers reach a worker.

    A worker that has lost its head, and calls the next one, says which `shards` it holds and the
    newest `epoch` it has heard of.
    """

    service: Literal["worker", "weights", "operator"]
    direction: Literal["down", "up"]
    caller: str
    address: str = ""
    pid: int = 0
    shards: tuple[Shard, ...] = ()
    epoch: int = 0


class Fetching(
    msgspec.Struct, frozen=True, kw_only=True, tag="fetching", forbid_unknown_fields=True
):
    """How far a worker has come with the tensors that it gets from the head."""

    what: str
    done_bytes: int
    total_bytes: int | None


class Alive(msgspec.Struct, frozen=True, kw_only=True, tag="alive", forbid_unknown_fields=True):
    """Sent every HEARTBEAT_S by a thread of its own, whatever the worker computes."""


class Prepared(
    msgspec.Struct, frozen=True, kw_only=True, tag="prepared", forbid_unknown_fields=True
):
    """`held` is False when memory did not allow it; `reason` says how much was lacking."""

    shard: Shard
    held: bool
    reason: str = ""


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded", forbid_unknown_fields=True):
    """`num_blocks` is what the worker's memory holds, `num_read_bytes` what it read of the file."""

    num_blocks: int
    max_context: int
    vocab_size: int
    num_read_bytes: int
    load_s: float
    description: str


class CacheOpened(
    msgspec.Struct, frozen=True, kw_only=True, tag="cache_opened", forbid_unknown_fields=True
):
    pass


class Measured(
    msgspec.Struct, frozen=True, kw_only=True, tag="measured", forbid_unknown_fields=True
):
    """A NodeProfile, or a list of Links, in JSON."""

    content: bytes


class Formed(msgspec.Struct, frozen=True, kw_only=True, tag="formed", forbid_unknown_fields=True):
    """`cache` is the identity of the worker's KV cache, `cache_descriptor` its open file."""

    epoch: int
    cache: str = ""
    cache_dtype: str = ""
    cache_descriptor: int = -1


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed", forbid_unknown_fields=True):
    """A command or the step `step` could not be done. `kind` is the error's class name.

    `unreachable` is the address of a neighbour that could not be dialled, if that is why.
    """

    epoch: int
    step: int | None = None
    kind: str
    message: str
    unreachable: str = ""


class Usage(msgspec.Struct, frozen=True, kw_only=True, tag="usage", forbid_unknown_fields=True):
    """Counters since the epoch began, sent about twice a second while there is work.

    `busy_s` is time spent computing, `waiting_s` waiting for another worker in the middle of a
    step. Bytes and messages are those sent, by stage boundaries and by tensor ranks.
    """

    epoch: int
    busy_s: float
    waiting_s: float
    num_steps: int
    stage_bytes: int
    stage_messages: int
    rank_bytes: int
    rank_messages: int


# ---- worker to worker ---------------------------------------------------------------------


class Greeting(
    msgspec.Struct, frozen=True, kw_only=True, tag="greeting", forbid_unknown_fields=True
):
    """The first message on a connection between workers: who sends what on it from now on.

    A "rank" sends partial sums, a "stage" hidden states, a "link" what is measured. `sender` is
    the rank in its own stage.
    """

    role: Role
    epoch: int
    sender: int


class Meeting(msgspec.Struct, frozen=True, kw_only=True, tag="meeting", forbid_unknown_fields=True):
    """Where a library's own process group meets; rank 0 tells the others."""

    host: str
    port: int


class HiddenStates(
    msgspec.Struct, frozen=True, kw_only=True, tag="hidden_states", forbid_unknown_fields=True
):
    """Announces a step's hidden states [num_tokens, E], which follow as the frame's body."""

    epoch: int
    step: int
    num_tokens: int
    dtype: str


ToWorker = Plan | Load | Prepare | OpenCache | Form | MeasureNode | MeasureLink | Stop
FromWorker = (
    StepResult
    | Alive
    | Fetching
    | Prepared
    | Loaded
    | CacheOpened
    | Formed
    | Measured
    | Failed
    | Usage
)
