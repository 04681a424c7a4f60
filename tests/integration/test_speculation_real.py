"""Guessed tokens with the real model: the same answers in fewer steps, in one process and split."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.compute import native
from shoal.config import EngineConfig, Split
from shoal.engine.outputs import RequestOutput, gather
from shoal.fleet.deployment import deploy
from shoal.request import SamplingParams
from shoal.schedule.foresight import Worth

LIST = "1. red apples\n2. green pears\n3. yellow bananas\n4. blue plums\n5. black cherries\n"
PROMPTS = (f"{LIST}The same list once more:\n{LIST}And again:\n1. red", "Once upon a time")
NUM_TOKENS = 48
WAYS = (
    SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, logprobs=1, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=11, max_tokens=NUM_TOKENS, n=2, presence_penalty=0.1),
)


def answered(split: Split, **how: Any) -> tuple[list[RequestOutput], int, int]:
    """All answers, one prompt after the other; how many steps they took and guesses were right."""
    deployment = deploy(
        EngineConfig(model="smollm2-135m", kv_memory_bytes=2**26, split=split, **how)
    )
    try:
        engine = deployment.engine
        outputs = []
        for params in WAYS:
            for prompt in PROMPTS:
                tokens = engine.tokenizer.encode(prompt)
                outputs.append(gather(tokens, params.n, engine.submit_sync(tokens, params)))
        stats = engine.stats()
        return outputs, stats.steps, stats.accepted_tokens
    finally:
        deployment.close()


@pytest.mark.slow
@pytest.mark.skipif(not native.is_available(), reason="rows depend on their company without csrc")
@pytest.mark.parametrize("split", [Split(), Split(pipeline=2, tensor=2)], ids=["whole", "split"])
def test_the_same_answers_in_fewer_steps(split: Split) -> None:
    calm, num_calm_steps, num_right = answered(split)
    assert num_right == 0
    quick, num_steps, num_right = answered(split, speculate=6)
    assert quick == calm
    assert num_right > NUM_TOKENS / 2
    assert num_steps < num_calm_steps - NUM_TOKENS / 3


@pytest.mark.slow
@pytest.mark.skipif(not native.is_available(), reason="rows depend on their company without csrc")
@pytest.mark.parametrize("split", [Split(), Split(pipeline=2)], ids=["whole", "split"])
def test_a_draft_model_saves_steps_and_changes_no_answer(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guessed by 4-bit weights of the same model. As large as it is it would soon rest."""
    monkeypatch.setattr(Worth, "is_resting", False)
    calm, num_calm_steps, _ = answered(split, quantize="int8")
    quick, num_steps, num_right = answered(split, quantize="int8", draft_model="smollm2-135m")
    assert quick == calm
    assert num_right > NUM_TOKENS
    assert num_steps < num_calm_steps - NUM_TOKENS


@pytest.mark.slow
@pytest.mark.skipif(not native.is_available(), reason="only native layers leave torch one thread")
def test_a_draft_model_leaves_the_large_one_its_threads() -> None:
    config = EngineConfig(
        model="smollm2-135m", dtype="float32", draft_model="smollm2-135m", num_threads=2
    )
    before = torch.get_num_threads()
    deployment = deploy(config)
    try:
        assert torch.get_num_threads() == 2
    finally:
        deployment.close()
        torch.set_num_threads(before)
