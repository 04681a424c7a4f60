"""Greedy text equals transformers' on the same weights, in fp32, with everything batched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from shoal import LLM, SamplingParams

NUM_TOKENS = 64
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Water boils at",
    "Q: What is photosynthesis?\nA:",
    "Dear Sir or Madam,",
    "The three laws of motion are",
    "1, 1, 2, 3, 5, 8,",
    "Le petit chat",
    "In 1969, the first",
    "A recipe for pancakes:\n\n1.",
    "import numpy as np\n",
    "The meaning of the word 'shoal' is",
    "To be, or not to be,",
    "My favourite animal is the octopus because",
    "The quick brown fox jumps over the lazy dog. " * 12,
    "🙂 Emoji are",
    "SELECT name FROM",
    "Yesterday I went to the market and bought",
    "x",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_greedy_text_of_twenty_prompts_equals_transformers(
    name: str, reference: Callable[[str], PreTrainedModel]
) -> None:
    with LLM(name, dtype="float32", kv_memory="1GiB") as llm:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
        outputs = llm.generate(PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        drawn = output.samples[0].token_ids
        assert drawn == greedy_choices(reference(name), output.prompt_tokens, drawn), prompt
        assert len(drawn) == NUM_TOKENS or drawn[-1] in llm.tokenizer.eos_ids


@torch.inference_mode()
def greedy_choices(model: PreTrainedModel, prompt_tokens: list[int], drawn: list[int]) -> list[int]:
    """What the model would choose after the prompt and after each drawn token but the last.

    Equal to `drawn` if and only if greedy generation draws `drawn`: one forward pass says so.
    """
    tokens = torch.tensor([prompt_tokens + drawn[:-1]])
    logits_TV = model(tokens).logits[0, len(prompt_tokens) - 1 :]
    choices: list[int] = logits_TV.argmax(dim=-1).tolist()
    return choices
