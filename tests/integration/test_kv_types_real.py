"""What holding keys and values in fewer bits costs a real model, and what it does not change."""

from __future__ import annotations

import pytest

from shoal import LLM, SamplingParams
from shoal.config import KVDType
from shoal.evaluate.perplexity import english_text, measure_perplexity

pytestmark = pytest.mark.slow

NUM_TOKENS = 768


def opened(kv_dtype: KVDType) -> LLM:
    return LLM(
        "smollm2-135m", kv_dtype=kv_dtype, kv_memory=64 * 2**20, num_threads=2, prefix_caching=False
    )


def test_perplexity_hardly_feels_the_type_of_the_cache() -> None:
    found = {}
    types: tuple[KVDType, ...] = ("float32", "int8")
    for kv_dtype in types:
        with opened(kv_dtype) as llm:
            assert f"{kv_dtype} KV cache" in llm.info.description
            tokens = llm.tokenizer.encode(english_text(), add_special=False)[:NUM_TOKENS]
            found[kv_dtype] = measure_perplexity(llm, tokens, window=256, progress=False).perplexity
    assert found["int8"] == pytest.approx(found["float32"], rel=5e-3)


def test_a_text_in_8_bits_is_the_same_alone_and_in_company() -> None:
    prompts = [f"The {thing} of the old town was" for thing in ("mayor", "only clock", "river")]
    params = SamplingParams(temperature=0, max_tokens=24)
    with opened("int8") as llm:
        together = [each.text for each in llm.generate(prompts, params, progress=False)]
        alone = [llm.generate([each], params, progress=False)[0].text for each in prompts]
    assert together == alone
