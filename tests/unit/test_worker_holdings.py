"""What a worker reads and what it keeps: shards read ahead, layers of other shards, caches."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from msgspec import structs
from scripted_head import (
    ScriptedHead,
    ScriptedWorker,
    form_of,
    load_of,
    neighbour,
    nothing_left_behind,
    plan_of,
    prepare_of,
)
from shared_models import ALL, CONFIG, DIMS, FIRST_HALF, SECOND_HALF, head_of, make_model

from shoal.compute.kernels import choose_scheme
from shoal.errors import OutOfMemory
from shoal.messages import StepResult
from shoal.models.config import decoder_config
from shoal.parallel.control import Failed, Formed, Greeting, Load, Loaded, Prepared
from shoal.parallel.partition import Shard, Span, shards_of
from shoal.weights.cache import silent
from shoal.weights.source import resolve
from shoal.worker import kv_cache, node_cores, shard_source, shard_weights
from shoal.worker import process as worker_process
from shoal.worker.holdings import Holdings
from shoal.worker.kv_cache import KVCache, num_blocks_for, slot_bytes
from shoal.worker.shard_source import ShardSource
from shoal.worker.worker import load_worker

FIRST_THREE, MIDDLE = (shards_of(DIMS, Span(*span), [1.0])[0] for span in ((0, 3), (1, 3)))
HALVES_OF_ALL = shards_of(DIMS, Span(0, 4), [1, 1])


@pytest.fixture(scope="module", params=["single", "gguf"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second one has a tied head."""
    return make_model(request.param, tmp_path_factory.mktemp("tiny") / "model").path


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def head() -> Iterator[ScriptedHead]:
    with tempfile.TemporaryDirectory() as folder:
        head = ScriptedHead(Path(folder))
        yield head
        head.close()


def read_bytes(worker: ScriptedWorker, load: Load) -> int:
    worker.say(load)
    return worker.hear(Loaded).num_read_bytes


def results(worker: ScriptedWorker, epoch: int) -> StepResult:
    """Of a worker that holds all of the model, so that there is nothing to receive or send."""
    worker.say(form_of(epoch))
    worker.hear(Formed)
    worker.say(plan_of(epoch))
    return worker.hear(StepResult)


def expected(model: Path) -> object:
    worker = load_worker(resolve(str(model)), load_of(model, ALL).config)
    return worker.execute(plan_of(1)).results


# ---- layers that are held already -------------------------------------------------------------


def test_a_load_for_what_a_worker_holds_reads_nothing(head: ScriptedHead, model: Path) -> None:
    worker = head.hire()
    assert read_bytes(worker, load_of(model, ALL)) > 0
    assert read_bytes(worker, load_of(model, ALL)) == 0
    assert results(worker, 1).results == expected(model)


def test_only_missing_layers_are_read(head: ScriptedHead, model: Path) -> None:
    fresh = read_bytes(head.hire("fresh"), load_of(model, FIRST_THREE))
    worker = head.hire("kept")
    first = read_bytes(worker, load_of(model, FIRST_HALF))
    third = read_bytes(worker, load_of(model, FIRST_THREE))
    assert (first + third, first > third > 0) == (fresh, True), "the embedding is not read again"
    assert read_bytes(worker, load_of(model, MIDDLE)) == 0
    back = read_bytes(worker, load_of(model, FIRST_HALF))
    assert 0 < back < first, "the embedding and the first layer"


def test_survivors_compute_what_the_whole_does(head: ScriptedHead, model: Path) -> None:
    worker = head.hire()
    read_bytes(worker, load_of(model, FIRST_HALF))
    worker.say(form_of(1, next_stage=[]))
    worker.hear(Formed)
    read_bytes(worker, load_of(model, ALL))
    assert results(worker, 2).results == expected(model)
    read_bytes(worker, load_of(model, MIDDLE))
    read_bytes(worker, load_of(model, ALL))
    assert results(worker, 3).results == expected(model)


def test_layers_of_ranks_go_on_with_the_stages_new_communicator(
    head: ScriptedHead, model: Path
) -> None:
    lower = shards_of(DIMS, Span(0, 2), [1, 1])
    ranks = [head.hire(f"t{rank}") for rank in range(2)]
    for epoch, shards in ((1, lower), (2, HALVES_OF_ALL)):
        for rank, shard in zip(ranks, shards, strict=True):
            read_bytes(rank, load_of(model, shard))
        for rank in ranks:
            rank.say(form_of(epoch, ranks=[each.address for each in ranks], transport="sockets"))
        for rank in ranks:
            rank.hear(Formed)
    for rank in ranks:
        rank.say(plan_of(2))
    (got,) = ranks[0].hear(StepResult).results
    (whole,) = expected(model)
    assert got.token_ids == whole.token_ids
    (scores,), (expected_scores,) = got.logprobs, whole.logprobs
    assert scores.top_logprobs == pytest.approx(expected_scores.top_logprobs, abs=1e-4)


def test_another_slice_of_the_same_layers_is_read(head: ScriptedHead, model: Path) -> None:
    worker = head.hire()
    assert read_bytes(worker, load_of(model, HALVES_OF_ALL[0])) > 0
    assert read_bytes(worker, load_of(model, HALVES_OF_ALL[1])) > 0


def test_a_file_that_has_changed_is_read_again(head: ScriptedHead, tmp_path: Path) -> None:
    path = make_model("single", tmp_path / "model").path
    worker = head.hire()
    first = read_bytes(worker, load_of(path, FIRST_HALF))
    os.utime(path / "model.safetensors", ns=(1, 1))
    assert read_bytes(worker, load_of(path, FIRST_HALF)) == first
    other = structs.replace(load_of(path, FIRST_HALF).config, dtype="bfloat16")
    assert read_bytes(worker, load_of(path, FIRST_HALF, config=other)) == first


def test_the_next_heads_weights_are_read_again_if_they_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker without files of its own asks the head whether the model is the same."""
    monkeypatch.setattr(shard_source, "cache_root", lambda: tmp_path / "worker")
    files = make_model("single", tmp_path / "model")
    load = structs.replace(load_of(files.path, FIRST_HALF), path="")
    holdings = Holdings()
    for name, is_other in (("first", True), ("second", False), ("third", True)):
        if name == "third":
            config = files.path / "config.json"
            config.write_text(config.read_text().replace("128", "256"))
        with head_of(files, tmp_path / name) as head:
            seat = holdings.take_seat(load, ShardSource(head.call, silent))
        assert (seat.loaded().num_read_bytes > 0) == is_other
    assert seat.loaded().max_context == 256


def test_what_is_held_stays_when_a_load_fails(head: ScriptedHead, tmp_path: Path) -> None:
    path = make_model("single", tmp_path / "model").path
    worker = head.hire()
    read_bytes(worker, load_of(path, FIRST_HALF))
    worker.say(load_of(tmp_path / "nowhere", SECOND_HALF))
    assert worker.hear(Failed).kind == "SourceError"
    worker.say(form_of(1))
    assert "before its shard is loaded" in worker.hear(Failed).message
    assert read_bytes(worker, load_of(path, FIRST_HALF)) == 0


def test_a_load_interrupts_the_step_under_way(head: ScriptedHead, model: Path) -> None:
    worker = head.hire()
    read_bytes(worker, load_of(model, SECOND_HALF))
    worker.say(form_of(1, previous_rank=0))
    upstream = neighbour(worker, Greeting(role="stage", epoch=1, sender=0))
    worker.hear(Formed)
    worker.say(plan_of(1))  # waits for hidden states that never come
    assert read_bytes(worker, load_of(model, ALL)) > 0, "and nobody's failure is reported"
    assert results(worker, 2).results == expected(model)
    upstream.close()


# ---- shards that are read ahead ---------------------------------------------------------------


def prepare(worker: ScriptedWorker, model: Path, shard: Shard) -> Prepared:
    worker.say(prepare_of(model, shard))
    return worker.hear(Prepared)


def test_a_spare_takes_over_what_it_has_read_ahead(head: ScriptedHead, model: Path) -> None:
    worker = head.hire()
    for shard in (FIRST_HALF, ALL):
        assert prepare(worker, model, shard) == Prepared(shard=shard, held=True)
    assert read_bytes(worker, load_of(model, ALL)) == 0
    assert results(worker, 1).results == expected(model)


def test_a_seat_drops_what_else_was_read_ahead(head: ScriptedHead, model: Path) -> None:
    worker = head.hire()
    for shard in (FIRST_HALF, SECOND_HALF):
        prepare(worker, model, shard)
    assert read_bytes(worker, load_of(model, FIRST_HALF)) == 0
    assert read_bytes(worker, load_of(model, SECOND_HALF)) > 0


def test_a_shard_that_would_not_leave_enough_memory_is_not_read_ahead(
    head: ScriptedHead, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable = 2**16
    monkeypatch.setattr(shard_weights, "usable_memory_bytes", lambda: usable)
    worker = head.hire()
    answer = prepare(worker, model, FIRST_HALF)
    assert not answer.held and answer.shard == FIRST_HALF
    assert "layers [0, 2) take" in answer.reason and "of the 0 MiB" in answer.reason
    usable = 2**30
    assert prepare(worker, model, FIRST_HALF).held
    assert read_bytes(worker, load_of(model, FIRST_HALF)) == 0


@pytest.mark.parametrize("shard", [FIRST_HALF, MIDDLE, ALL])
def test_what_is_estimated_is_what_a_shard_takes(
    shard: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for norms, which are not counted."""
    files = make_model("single", tmp_path / "model")
    model = decoder_config(CONFIG)
    heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    layers = len(shard.layers) * model.hidden_size * (heads + 3 * model.mlp_size)
    tables = (shard.is_first + shard.is_last) * model.vocab_size * model.hidden_size
    wanted = 4 * (layers + tables)
    for usable, is_enough in ((2 * wanted, True), (2 * wanted - 1, False)):
        monkeypatch.setattr(shard_weights, "usable_memory_bytes", lambda size=usable: size)
        reason = shard_weights.lack_of_memory(files, shard, load_of(files.path, ALL).config)
        assert (reason == "") == is_enough


# ---- caches, threads and cores ----------------------------------------------------------------

SCHEME = choose_scheme("float32", "none")
BLOCK_BYTES = 16 * slot_bytes(decoder_config(CONFIG), ALL, SCHEME.dtype)


def num_blocks(wanted: int | None, *, share: float = 0.5) -> int:
    return num_blocks_for(
        decoder_config(CONFIG),
        ALL,
        SCHEME.dtype,
        block_size=16,
        kv_memory_bytes=BLOCK_BYTES * 6,
        memory_share=share,
        wanted=wanted,
    )


def test_the_replicas_number_of_blocks_is_kept_while_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_cache, "usable_memory_bytes", lambda: 10 * BLOCK_BYTES)
    assert num_blocks(None) == 3
    assert num_blocks(10) == 10, "more than was given at first, as all others have"
    assert num_blocks(2) == 2
    assert num_blocks(11) == 5, "its part of what is there"
    monkeypatch.setattr(kv_cache, "usable_memory_bytes", lambda: BLOCK_BYTES - 1)
    with pytest.raises(OutOfMemory, match=r"no block of KV cache, which takes .* \(50%\)"):
        num_blocks(1)


def test_a_worker_keeps_the_number_of_blocks(head: ScriptedHead, model: Path) -> None:
    worker = head.hire()
    for wanted in (7, 7, 9):
        worker.say(load_of(model, ALL, num_blocks=wanted))
        assert worker.hear(Loaded).num_blocks == wanted
        worker.say(form_of(wanted + 1, num_blocks=wanted))
        worker.hear(Formed)


def test_a_worker_does_not_go_on_with_a_cache_of_another_type(
    head: ScriptedHead, model: Path
) -> None:
    worker = head.hire()
    formed = []
    for epoch, kv_dtype in enumerate(("int8", "int8", "float16"), start=1):
        load = load_of(model, ALL, num_blocks=7)
        config = structs.replace(load.config, kv_dtype=kv_dtype)
        worker.say(structs.replace(load, config=config))
        loaded = worker.hear(Loaded)
        assert f"{kv_dtype} KV cache" in loaded.description
        assert (loaded.num_read_bytes > 0) == (epoch == 1)
        worker.say(form_of(epoch, num_blocks=7))
        formed.append(worker.hear(Formed))
    assert [each.cache_dtype for each in formed] == ["int8", "int8", "float16"]
    first, same, other = (each.cache for each in formed)
    assert first == same != other


def test_a_caches_memory_is_taken_when_it_is_written_to_or_at_once() -> None:
    process = psutil.Process()
    shard = shards_of(DIMS, Span(0, 1), [1.0])[0]
    num_slots = 2**26 // slot_bytes(decoder_config(CONFIG), shard, SCHEME.dtype)
    before = process.memory_info().rss
    cache = KVCache(decoder_config(CONFIG), shard, num_slots=num_slots, dtype=SCHEME.dtype)
    assert process.memory_info().rss - before < 2**24
    assert cache.keys[0][-1].abs().sum() == 0
    cache.take_memory()
    assert process.memory_info().rss - before > 2**25


def test_threads_and_cores_are_those_of_the_load(
    head: ScriptedHead, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: dict[int, tuple[int, ...]] = {}
    num_threads: list[int] = []
    for module in (node_cores, worker_process):
        monkeypatch.setattr(module, "set_num_threads", num_threads.append)
    monkeypatch.setattr(node_cores.os, "sched_setaffinity", pinned.__setitem__)
    worker = head.hire()
    core = min(os.sched_getaffinity(0))
    read_bytes(worker, load_of(model, FIRST_HALF, num_threads=3, cores=(core,)))
    assert num_threads == [1, 3], "at its start, and in its seat"
    known = {thread.native_id for thread in threading.enumerate()}
    assert known <= pinned.keys() and set(pinned.values()) == {(core,)}


def test_cores_that_are_not_there_are_refused(
    head: ScriptedHead, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(node_cores.os, "sched_setaffinity", refuse)
    worker = head.hire()
    worker.say(load_of(model, FIRST_HALF, cores=(4095,)))
    failed = worker.hear(Failed)
    assert failed.kind == "ConfigError" and "[4095]: Invalid argument" in failed.message
