"""Checkpoints shared by the golden tests, each made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from tiny_checkpoints import CONFIGS, Golden, make_golden

from shoal.weights.source import resolve


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Golden]:
    """The checkpoint of a name in CONFIGS, made once."""
    made: dict[str, Golden] = {}

    def make(name: str) -> Golden:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = make_golden(CONFIGS[name](), folder)
        return made[name]

    transformers.utils.logging.disable_progress_bar()
    return make


@pytest.fixture(scope="session")
def reference() -> Callable[[str], transformers.PreTrainedModel]:
    """transformers' model of a catalogue's GGUF file, read once: Gemma's takes a minute."""
    read: dict[str, transformers.PreTrainedModel] = {}

    def get(name: str) -> transformers.PreTrainedModel:
        if name not in read:
            path = resolve(name).path
            read[name] = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32
            ).eval()
        return read[name]

    transformers.utils.logging.disable_progress_bar()
    return get
