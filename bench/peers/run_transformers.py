"""transformers' `generate` as an engine that a benchmark asks: all prompts as one batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.peers.protocol import Calls, Settings, Streams, serve


def float32_model(path: Path) -> Any:
    """That of a GGUF file."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )


def load(settings: Settings) -> tuple[dict[str, Any], Calls]:
    torch.set_num_threads(settings["threads"])
    model = float32_model(Path(settings["weights"]))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    about = {
        "engine": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "computes": "float32",
        "caches_prefixes": False,
    }
    return about, {"generate": partial(generate, model)}


def generate(model: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Prompts of one length. The model's generation config must name no end of sequence."""
    streams = Streams(len(prompts))

    def watch(tokens_BT: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        for stream, token in enumerate(tokens_BT[:, -1].tolist()):
            streams.came(stream, [token])
        return torch.zeros(len(prompts), dtype=torch.bool)

    prompts_BT = torch.tensor(prompts)
    model.generate(
        prompts_BT,
        attention_mask=torch.ones_like(prompts_BT),
        max_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=transformers.StoppingCriteriaList([watch]),
    )
    return streams.answer()


if __name__ == "__main__":
    serve(load)
