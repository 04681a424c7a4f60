"""Checkpoints shared by the golden tests, each made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import transformers
from tiny_checkpoints import CONFIGS, Golden, make_golden


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
