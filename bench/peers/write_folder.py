"""A GGUF file as a float32 folder of transformers, for engines that read nothing else.

Runs in the environment of transformers: `python -m bench.peers.write_folder GGUF FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers

from bench.peers.run_transformers import float32_model


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    model = float32_model(source)
    # What the file was rounded to is no property of the folder's plain weights.
    model.config.quantization_config = None
    model.save_pretrained(target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    main()
