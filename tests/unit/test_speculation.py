"""Guessed tokens change nothing but the number of steps: a small model with them and without."""

from __future__ import annotations

from typing import Any

import pytest
from scheduler_driver import make_request, make_scheduler
from shared_models import make_model

from shoal.compute import native
from shoal.compute.threads import set_num_threads
from shoal.config import EngineConfig
from shoal.messages import Chunk, Event, Sampling
from shoal.request import Request
from shoal.worker.batch import Batch
from shoal.worker.worker import Worker, load_worker

NUM_BLOCKS, BLOCK_SIZE = 64, 16

needs_native = pytest.mark.skipif(
    not native.is_available(), reason="without native kernels a row depends on its company"
)


@pytest.fixture(scope="module", params=["gguf", "single"])
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    files = make_model(request.param, tmp_path_factory.mktemp("speculation") / request.param)
    set_num_threads(1)
    # Over such a cache texts of these random models repeat themselves in each of the ways below.
    config = EngineConfig(model=str(files.path), kv_dtype="float32", kv_memory_bytes=4 * 2**20)
    return load_worker(files, config)


def answers(worker: Worker, requests: list[Request], **options: Any) -> tuple[list[Event], Any]:
    """All events by request, and what the scheduler has counted; `steps` is a float in it."""
    scheduler = make_scheduler(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, **options)
    scheduler.add_all(requests)
    events: list[Event] = []
    num_steps = 0
    while (plan := scheduler.plan(0.0)) is not None:
        events += scheduler.complete(worker.execute(plan))
        scheduler.check()
        num_steps += 1
    return sorted(events, key=lambda event: event.request_id), (num_steps, scheduler.counts())


def loops(request_id: int = 1, **overrides: Any) -> Request:
    """A prompt that says the same again and again."""
    prompt = [3 + request_id, 17, 40, 9] * 5
    return make_request(request_id, prompt_tokens=prompt, max_tokens=40, **overrides)


# Of three tokens only: one can guess what comes, and not always.
FEW: dict[str, Any] = {"logit_bias": {5: 100.0, 6: 100.0, 7: 100.0}}
GREEDY = FEW | {"temperature": 0.0}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "any token": {"temperature": 0.3},
    "seeded": FEW | {"temperature": 3.0},
    "cut off": FEW | {"temperature": 2.0, "top_p": 0.9, "top_k": 20},
    "with scores": FEW | {"temperature": 2.0, "logprobs": 3},
    "with scores of the prompt": GREEDY | {"prompt_logprobs": 2, "logprobs": 0},
    "penalised": GREEDY | {"repetition_penalty": 1.02, "frequency_penalty": 0.1},
}


@needs_native
@pytest.mark.parametrize("way", WAYS)
def test_answers_are_the_same_to_the_bit(worker: Worker, way: str) -> None:
    requests = [loops(i, params=WAYS[way]) for i in range(1, 5)]
    calm, (num_calm_steps, counts) = answers(worker, requests)
    assert (counts.drafted_tokens, counts.accepted_tokens) == (0, 0)
    for max_drafted in (1, 3, 8):
        quick, (num_steps, counts) = answers(worker, requests, max_drafted=max_drafted)
        assert quick == calm
        assert counts.generated_tokens == len(calm)
        assert 0 < counts.accepted_tokens <= counts.drafted_tokens
        assert num_steps <= num_calm_steps


@needs_native
def test_fewer_steps_where_a_text_repeats_itself(worker: Worker) -> None:
    calm, (num_calm_steps, _) = answers(worker, [loops(params=GREEDY)])
    quick, (num_steps, counts) = answers(worker, [loops(params=GREEDY)], max_drafted=6)
    assert quick == calm
    assert num_steps == num_calm_steps - counts.accepted_tokens < num_calm_steps / 2


@needs_native
def test_stop_tokens_end_an_answer_in_the_middle_of_a_draft(worker: Worker) -> None:
    calm, _ = answers(worker, [loops(params=GREEDY)])
    for at in range(4, 30):
        stop_ids = frozenset({calm[at].token_id or 0})
        for min_tokens in (0, at, at + 1):
            request = loops(params=GREEDY | {"min_tokens": min_tokens}, stop_ids=stop_ids)
            expected, _ = answers(worker, [request])
            assert answers(worker, [request], max_drafted=5)[0] == expected


def test_chunks_with_as_many_guesses_share_a_group() -> None:
    def chunk(request_id: int, start: int, num_drafted: int) -> Chunk:
        return Chunk(
            request_id=request_id,
            start=start,
            tokens=[1] * (1 + num_drafted),
            block_ids=[4 * request_id + i for i in range(4)],
            sampling=Sampling(seed=0, position=start + 1),
            num_drafted=num_drafted,
        )

    drafts = [(1, 20, 2), (2, 30, 0), (3, 7, 2), (4, 9, 0)]
    prompt = Chunk(request_id=5, start=0, tokens=[1, 2, 3], block_ids=[20])
    batch = Batch([prompt, *(chunk(*draft) for draft in drafts)], BLOCK_SIZE)
    assert [c.request_id for c in batch.chunks] == [4, 2, 3, 1, 5]
    assert [(g.start, g.stop) for g in batch.places.groups] == [(0, 2), (2, 8), (8, 11)]
    assert batch.places.groups[1].positions_BQ.tolist() == [[7, 8, 9], [20, 21, 22]]
    assert batch.positions == [9, 30, 7, 8, 9, 20, 21, 22, 0, 1, 2]
    assert batch.last_rows == [0, 1, 4, 7, 10]
    assert batch.read_rows == [0, 1, 2, 3, 4, 5, 6, 7], "nobody reads what a prompt's middle makes"
    assert batch.last_reads == [0, 1, 4, 7, 7]
