"""A worker process, driven by a scripted head over the sockets it would have."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from scripted_head import (
    WAIT_S,
    ScriptedHead,
    ScriptedWorker,
    eventually,
    form_of,
    load_of,
    neighbour,
    nothing_left_behind,
    plan_of,
)
from shared_models import ALL, DIMS, FIRST_HALF, SECOND_HALF, make_model

from shoal.config import HEARTBEAT_S, Transport
from shoal.errors import PeerLost
from shoal.messages import Chunk, StepResult
from shoal.parallel.address import parse_address
from shoal.parallel.channel import Channel
from shoal.parallel.control import Alive, Failed, Formed, FromWorker, Greeting, Loaded, Stop, Usage
from shoal.parallel.endpoint import LocalOnly, dial
from shoal.parallel.partition import Shard, Span, shards_of
from shoal.weights.source import resolve
from shoal.worker import neighbours, peers
from shoal.worker.worker import load_worker


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("single", tmp_path_factory.mktemp("tiny") / "model").path


@pytest.fixture(scope="module", autouse=True)
def clean() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def head() -> Iterator[ScriptedHead]:
    # Not tmp_path: a unix socket's path has room for 107 bytes.
    with tempfile.TemporaryDirectory() as folder:
        head = ScriptedHead(Path(folder))
        yield head
        head.close()


def loaded(head: ScriptedHead, model: Path, shard: Shard = ALL, name: str = "w") -> ScriptedWorker:
    worker = head.hire(name)
    worker.say(load_of(model, shard))
    worker.hear(Loaded)
    return worker


def whole_result(model: Path, *steps: tuple[int, ...]) -> StepResult:
    """What the undivided model makes of the last of the steps."""
    worker = load_worker(resolve(str(model)), load_of(model, ALL).config)
    start = 0
    for tokens in steps:
        result = worker.execute(plan_of(1, start=start, tokens=tokens))
        start += len(tokens)
    return result


def hung_up(channel: Channel) -> bool:
    """Whether the other side has."""
    try:
        channel.receive(0.01)
    except PeerLost as error:
        return "silent" not in error.message
    raise AssertionError("somebody answered")


def test_a_worker_introduces_itself_on_both_connections(head: ScriptedHead) -> None:
    worker = head.hire("r0s0t0-1")
    down, up = worker.hellos
    assert (down.direction, up.direction) == ("down", "up")
    assert down.service == up.service == "worker"
    assert down.caller == up.caller == "r0s0t0-1"
    assert down.address == up.address and down.address.endswith("r0s0t0-1.sock")
    assert down.pid == up.pid == os.getpid() and (down.shards, down.epoch) == ((), 0)


def test_a_worker_gives_signs_of_life_whatever_it_does(head: ScriptedHead, model: Path) -> None:
    worker = loaded(head, model, SECOND_HALF)
    worker.say(form_of(1, previous_rank=0))  # waits for a neighbour that does not come
    beats = 0
    start_s = time.monotonic()
    while time.monotonic() - start_s < 5 * HEARTBEAT_S:
        header, _ = worker.reports.receive(5 * HEARTBEAT_S)
        beats += isinstance(msgspec.msgpack.decode(header, type=FromWorker), Alive)
    assert 3 <= beats <= 6


def test_a_worker_whose_heartbeat_cannot_be_sent_has_lost_its_head(head: ScriptedHead) -> None:
    worker = head.hire()
    worker.reports.close()
    worker.join()


def test_a_worker_loads_forms_and_steps(head: ScriptedHead, model: Path) -> None:
    worker = head.hire()
    worker.say(load_of(model, ALL))
    told = worker.hear(Loaded)
    assert told.num_blocks > 0 and told.max_context == 128 and told.vocab_size == DIMS.vocab_size
    assert told.num_read_bytes > 0 and "float32" in told.description
    worker.say(form_of(1))
    assert worker.hear(Formed).epoch == 1
    worker.say(plan_of(1, step=7))
    result = worker.hear(StepResult)
    assert (result.epoch, result.step) == (1, 7)
    assert result.results == whole_result(model, (3, 4, 5)).results
    usage = worker.hear(Usage)
    assert (usage.epoch, usage.num_steps) == (1, 1) and usage.busy_s > 0


def test_two_stages_in_threads_compute_what_the_whole_does(head: ScriptedHead, model: Path) -> None:
    first, second = loaded(head, model, FIRST_HALF, "a"), loaded(head, model, SECOND_HALF, "b")
    first.say(form_of(1, next_stage=[second.address]))
    second.say(form_of(1, previous_rank=0))
    for worker in (first, second):
        worker.hear(Formed)
    for step, tokens in enumerate([(3, 4, 5), (6,)]):
        for worker in (first, second):
            worker.say(plan_of(1, step, start=3 * step, tokens=tokens))
        result = second.hear(StepResult)
    assert result.results == whole_result(model, (3, 4, 5), (6,)).results
    usage = first.hear(Usage)
    assert usage.stage_messages > 0 and usage.stage_bytes > 3 * 4 and usage.rank_messages == 0


@pytest.mark.parametrize("transport", ["shared-memory", "sockets"])
def test_two_ranks_in_threads_compute_what_the_whole_does(
    transport: Transport, head: ScriptedHead, model: Path
) -> None:
    shards = shards_of(DIMS, Span(0, DIMS.num_layers), [1, 1])
    ranks = [loaded(head, model, shard, f"t{shard.rank}") for shard in shards]
    form = form_of(1, ranks=[rank.address for rank in ranks], transport=transport)
    for rank in ranks:
        rank.say(form)
    for rank in ranks:
        rank.hear(Formed)
        rank.say(plan_of(1))
    (expected,) = whole_result(model, (3, 4, 5)).results
    (got,) = ranks[0].hear(StepResult).results
    assert got.token_ids == expected.token_ids
    (scores,), (expected_scores,) = got.logprobs, expected.logprobs
    assert scores.top_logprobs == pytest.approx(expected_scores.top_logprobs, abs=1e-4)


# ---- what goes wrong --------------------------------------------------------------------------


def test_messages_in_the_wrong_order_are_refused_and_do_no_harm(
    head: ScriptedHead, model: Path
) -> None:
    worker = head.hire()
    worker.say(form_of(1))
    failed = worker.hear(Failed)
    assert (failed.kind, failed.epoch, failed.step) == ("ConfigError", 1, None)
    assert "cannot form before its shard is loaded" in failed.message
    worker.say(plan_of(1, step=4))
    failed = worker.hear(Failed)
    assert (failed.kind, failed.epoch, failed.step) == ("ConfigError", 1, 4)
    assert "a plan came before its stage was formed" in failed.message
    worker.say(load_of(model, ALL))
    worker.hear(Loaded)
    worker.say(form_of(2))
    assert worker.hear(Formed).epoch == 2


def test_a_model_that_is_not_there_is_reported(head: ScriptedHead, tmp_path: Path) -> None:
    worker = head.hire()
    worker.say(load_of(tmp_path / "nowhere", ALL))
    failed = worker.hear(Failed)
    assert failed.kind == "SourceError" and "nowhere" in failed.message


def test_a_step_that_fails_is_reported_and_the_next_one_works(
    head: ScriptedHead, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = loaded(head, model)
    worker.say(form_of(1))
    worker.hear(Formed)
    impossible = Chunk(request_id=1, start=0, tokens=[3], block_ids=[10**6])
    worker.say(msgspec.structs.replace(plan_of(1, step=2), chunks=[impossible]))
    failed = worker.hear(Failed)
    assert (failed.epoch, failed.step) == (1, 2)
    assert "Plan failed" in caplog.text, "a bug of ours must leave a trace"
    worker.say(plan_of(1, step=3))
    assert worker.hear(StepResult).step == 3


def test_a_worker_ends_when_it_is_told_to(head: ScriptedHead) -> None:
    worker = head.hire()
    worker.say(Stop())
    worker.join()


def test_a_worker_ends_when_its_head_hangs_up_in_mid_step(head: ScriptedHead, model: Path) -> None:
    worker = loaded(head, model, SECOND_HALF)
    worker.say(form_of(1, previous_rank=0))
    upstream = neighbour(worker, Greeting(role="stage", epoch=1, sender=0))
    worker.hear(Formed)
    worker.say(plan_of(1))  # waits for hidden states that never come
    worker.hang_up()
    worker.join()
    upstream.close()


def test_a_worker_ends_when_its_head_hangs_up_while_it_forms(
    head: ScriptedHead, model: Path
) -> None:
    worker = loaded(head, model, SECOND_HALF)
    worker.say(form_of(1, previous_rank=0))
    worker.hang_up()
    worker.join()


def test_a_head_that_talks_nonsense_is_left(
    head: ScriptedHead, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    worker = head.hire()
    worker.commands.send(b"\x93\x01\x02\x03")
    worker.join()
    assert "no more commands from the head" in caplog.text


# ---- epochs -----------------------------------------------------------------------------------


def test_a_newer_form_interrupts_a_stage_that_waits_for_hidden_states(
    head: ScriptedHead, model: Path
) -> None:
    worker = loaded(head, model, SECOND_HALF)
    worker.say(form_of(1, previous_rank=0))
    old = neighbour(worker, Greeting(role="stage", epoch=1, sender=0))
    worker.hear(Formed)
    worker.say(plan_of(1))
    start_s = time.monotonic()
    worker.say(form_of(2, previous_rank=0))
    new = neighbour(worker, Greeting(role="stage", epoch=2, sender=0))
    assert worker.hear(Formed).epoch == 2, "the interrupted step is nobody's failure"
    assert time.monotonic() - start_s < WAIT_S / 2
    old.close()
    new.close()


def test_a_newer_form_interrupts_one_whose_neighbour_does_not_come(
    head: ScriptedHead, model: Path
) -> None:
    worker = loaded(head, model, SECOND_HALF)
    worker.say(form_of(1, previous_rank=0))
    start_s = time.monotonic()
    worker.say(form_of(2, previous_rank=0))
    new = neighbour(worker, Greeting(role="stage", epoch=2, sender=0))
    assert worker.hear(Formed).epoch == 2
    assert time.monotonic() - start_s < WAIT_S / 2
    new.close()


def test_a_neighbour_out_of_reach_is_named(
    head: ScriptedHead, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose system still accepts connections, but that does not answer."""
    monkeypatch.setattr(neighbours, "DIAL_S", 0.1)
    worker = loaded(head, model, FIRST_HALF)
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as frozen:
        frozen.bind(f"{folder}/frozen.sock")
        frozen.listen()
        addresses = [f"unix:{folder}/frozen.sock", f"unix:{folder}/gone.sock"]
        for epoch, address in enumerate(addresses, start=1):
            worker.say(form_of(epoch, next_stage=[address]))
            failed = worker.hear(Failed)
            assert (failed.kind, failed.epoch) == ("PeerLost", epoch)
            assert failed.unreachable == address and address in failed.message


@pytest.mark.parametrize("rank", [0, 1])
def test_a_newer_form_interrupts_ranks_that_wait_for_shared_memory(
    rank: int, head: ScriptedHead, model: Path
) -> None:
    shards = shards_of(DIMS, Span(0, DIMS.num_layers), [1, 1])
    worker = loaded(head, model, shards[rank], "t0")
    worker.say(form_of(1, ranks=[worker.address, "unix:/dead"]))
    other = loaded(head, model, shards[1 - rank], "t1")
    start_s = time.monotonic()
    for each in (worker, other):
        each.say(form_of(2, ranks=[worker.address, other.address]))
    for each in (worker, other):
        assert each.hear(Formed).epoch == 2
    assert time.monotonic() - start_s < WAIT_S / 2


def test_stale_plans_are_dropped(head: ScriptedHead, model: Path) -> None:
    worker = loaded(head, model)
    worker.say(form_of(3))
    worker.hear(Formed)
    worker.say(plan_of(2, step=1))
    worker.say(plan_of(3, step=2))
    result = worker.hear(StepResult)
    assert (result.epoch, result.step) == (3, 2)


def test_a_cache_of_another_size_is_opened_anew(head: ScriptedHead, model: Path) -> None:
    worker = loaded(head, model)
    for epoch, num_blocks in ((1, 8), (2, 3), (3, 8)):
        worker.say(form_of(epoch, num_blocks=num_blocks))
        worker.hear(Formed)
        worker.say(plan_of(epoch))
        assert worker.hear(StepResult).results == whole_result(model, (3, 4, 5)).results


# ---- strangers --------------------------------------------------------------------------------


def test_strangers_on_the_peers_port_are_dropped_and_logged(
    head: ScriptedHead,
    model: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "_GREETING_S", 0.1)
    worker = loaded(head, model, SECOND_HALF)
    foreign = socket.socket(socket.AF_UNIX)
    foreign.connect(parse_address(worker.address).path)
    foreign.sendall(b"GET / HTTP/1.1\r\n\r\n")
    rude = dial(worker.address, LocalOnly(), timeout_s=WAIT_S)
    rude.send(b"not msgpack")
    silent = dial(worker.address, LocalOnly(), timeout_s=WAIT_S)
    late = neighbour(worker, Greeting(role="stage", epoch=0, sender=5))
    worker.say(form_of(1, previous_rank=0))
    upstream = neighbour(worker, Greeting(role="stage", epoch=1, sender=0))
    assert worker.hear(Formed).epoch == 1
    eventually(lambda: "it is not Shoal" in caplog.text, "nobody noted the foreign bytes")
    eventually(lambda: caplog.text.count("is dropped") == 2, "rude or silent ones are kept")
    for each in (foreign, rude, silent, late, upstream):
        each.close()


def test_of_two_connections_that_greet_alike_one_is_closed(head: ScriptedHead) -> None:
    worker = head.hire()
    greeting = Greeting(role="stage", epoch=1, sender=0)
    both = [neighbour(worker, greeting) for _ in range(2)]
    eventually(lambda: any(map(hung_up, both)), "both are kept open")
    assert sum(map(hung_up, both)) == 1
    for each in both:
        each.close()
